"""Where a run's workers meet: torch's store and gloo listen on the first worker's own address, and on no other.

Neither asks who is there. Left to themselves, the store listens on all network interfaces, and gloo on whichever one
the machine's name leads to.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SHARED: list[TCPStore] = []
"""The store that this process has made for the others to meet at, for as long as it lives."""


@dataclass
class OwnAddressConfig(TorchConfig):  # type: ignore[misc]  # Ray Train has no types
    """Ray Train's configuration of torch, with a backend that listens on the nodes' own addresses."""

    @property
    def backend_cls(self) -> type[OwnAddressBackend]:
        return OwnAddressBackend


class OwnAddressBackend(_TorchBackend):  # type: ignore[misc]  # the same
    """Sets up torch's process group when Ray Train has started the workers."""

    def on_start(self, worker_group: Any, backend_config: OwnAddressConfig) -> None:
        """Called by Ray Train, in the driver's controller."""
        backend = backend_config.backend or ("nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo")
        worker_group.execute(_set_torch_distributed_env_vars)
        address, port = worker_group.execute_single(0, open_store)
        joined = [
            worker_group.execute_single_async(
                rank,
                join,
                backend=backend,
                world_rank=rank,
                world_size=len(worker_group),
                address=address,
                port=port,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joined)


def open_store() -> tuple[str, int]:
    """Opens a store on this node's address; returns where it is."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = int(listening.getsockname()[1])
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    SHARED[:] = [store]
    return address, port


def join(*, backend: str, world_rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Joins torch's process group, whose store is at an address."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ.setdefault(GLOO_INTERFACE, interface_of(ray.util.get_node_ip_address()))
    timeout = timedelta(seconds=timeout_s)
    store = (
        SHARED[0]
        if world_rank == 0
        else TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    )
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=world_size, timeout=timeout)


def interface_of(address: str) -> str:
    """Name of the network interface that has an address of this machine.

    Raises:
        LookupError: none has it.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return str(name)
    raise LookupError(f"no network interface of this machine has the address {address}")
