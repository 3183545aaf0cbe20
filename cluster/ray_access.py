"""Who may reach Ray, which runs whatever it is sent: only those with its token, in every Ray that we start or join.

Some of its ports listen on all network interfaces, whatever address the node has; the token is all that guards them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from alignment.errors import ClusterError

MODE = "RAY_AUTH_MODE"
TIMEOUT_S = 10.0
"""For a cluster to refuse, or to answer, who has no token."""


def require_token() -> None:
    """Has this process, and the Ray that it starts or joins, use the token. To be called before `ray.init`.

    Raises:
        ClusterError: the environment turns it off.
    """
    if os.environ.setdefault(MODE, "token").lower() != "token":
        raise ClusterError(
            f"{MODE}={os.environ[MODE]} turns Ray's authentication off, and whoever reached one of its ports could run "
            f"code here. Leave it out, or set {MODE}=token"
        )
    if "ray" in sys.modules:  # it has read its environment already
        from ray._raylet import Config  # type: ignore[attr-defined]  # its stubs leave it out

        Config.initialize("")


def check_token(gcs_address: str) -> None:
    """Makes sure that a cluster answers nobody without the token.

    Args:
        gcs_address: host and port of its GCS, as `ray.get_runtime_context().gcs_address` has it.

    Raises:
        ClusterError: it does answer, or it cannot be reached.
    """
    if os.environ.get("RAY_USE_TLS") == "1":  # only who has a certificate is talked to
        return
    import grpc
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with grpc.insecure_channel(gcs_address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            raise ClusterError(f"the Ray cluster at {gcs_address} cannot be asked: {error.details()}") from error
    raise ClusterError(
        f"the Ray cluster at {gcs_address} has no authentication: whoever reaches one of its ports can run code on all "
        f"its nodes. Make a token (`ray get-auth-token --generate`), and start every node with {MODE}=token"
    )


def protect_token_file() -> None:
    """Takes from others what Ray lets them read: the token that it has made and kept for this user."""
    file = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # there is none, or it is not ours
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            file.chmod(0o600)
