"""Where no keys are needed, requests are answered only if they come by this machine's own names, and from its own page.

Otherwise any page that a browser shows could ask.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from serving.schema import RequestError

HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""This machine's own names, with any port, since people forward ports."""


def check_local(headers: Sequence[tuple[bytes, bytes]], cors_origins: Collection[str] | None = None) -> None:
    """Refuses what a browser sends for a page that is not this endpoint's own, by whatever name it came here.

    Args:
        cors_origins: pages elsewhere that may ask nevertheless; None where no setting names any.

    Raises:
        RequestError: 403, the request uses another name than this machine's, or it comes from a page elsewhere.
    """
    values_by_name: dict[bytes, list[str]] = {}
    for name, value in headers:
        values_by_name.setdefault(name.lower(), []).append(value.decode("latin-1"))
    hosts, origins = values_by_name.get(b"host", []), values_by_name.get(b"origin", [])
    if len(hosts) != 1 or HOST.fullmatch(hosts[0]) is None:
        raise RequestError(
            403, "Without keys, this endpoint answers by the names 127.0.0.1, localhost and [::1] alone."
        )
    if origins and set(origins) <= set(cors_origins or ()):
        return
    own_origins = {f"http://{hosts[0]}", f"https://{hosts[0]}"}
    if not set(origins) <= own_origins or not set(values_by_name.get(b"sec-fetch-site", [])) <= {"same-origin", "none"}:
        setting = "" if cors_origins is None else "; cors_origins names those that may"
        raise RequestError(403, f"Without keys, pages of other origins may not ask here{setting}.")
