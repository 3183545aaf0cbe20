"""What an endpoint on 127.0.0.1 listens on: what is open to other machines answers nobody who has not Ray's token."""

from __future__ import annotations

import grpc
import psutil
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from tests.processes import descendants, is_of_this_machine, listening
from tests.serving.conftest import Running


def test_ports_that_other_machines_reach_want_the_token(endpoint: Running) -> None:
    ports = listening([psutil.Process(endpoint.process.pid), *descendants(of=endpoint.process.pid)])
    outside = {port for port, address in ports.items() if not is_of_this_machine(address)}
    assert len(ports) > len(outside), "Ray's own and the endpoint's are here"
    assert int(endpoint.url.rpartition(":")[2]) not in outside
    for port in outside:  # what Serve's replicas hear each other on; they unpickle it
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            with pytest.raises(grpc.RpcError) as raised:
                ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=30)
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED, (port, raised.value.details())
