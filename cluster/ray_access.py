"""Access to Ray, which runs any code that it is sent: every Ray that we start or join requires its token.

Some of Ray's ports listen on all network interfaces, whatever address the node has. Only the token protects them.
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
"""Time limit for a cluster's answer to a request without a token."""


def require_token() -> None:
    """Turns token authentication on for this process and for the Ray that it starts or joins.

    It must be called before `ray.init`.

    Raises:
        ClusterError: the environment turns authentication off.
    """
    if os.environ.setdefault(MODE, "token").lower() != "token":
        raise ClusterError(
            f"{MODE}={os.environ[MODE]} turns Ray's authentication off, and whoever reached one of its ports could run "
            f"code here. Leave it out, or set {MODE}=token"
        )
    if "ray" in sys.modules:  # Ray has read the environment already
        from ray._raylet import Config  # type: ignore[attr-defined]  # its stubs leave it out

        Config.initialize("")


def check_token(gcs_address: str) -> None:
    """Checks that a cluster refuses requests without the token.

    Args:
        gcs_address: host and port of the cluster's GCS, as in `ray.get_runtime_context().gcs_address`.

    Raises:
        ClusterError: the cluster answers, or it cannot be reached.
    """
    if os.environ.get("RAY_USE_TLS") == "1":  # the cluster requires a certificate
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
    """Makes Ray's file with this user's token unreadable for other users."""
    file = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # there is no file, or it belongs to another user
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            file.chmod(0o600)
