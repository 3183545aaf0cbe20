"""The rendezvous of a run's workers: torch's store and gloo listen only on the workers' own addresses.

Neither of them authenticates a peer. By default, the store listens on all network interfaces, and gloo on the interface
to which the machine's name resolves.
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
"""The store of this process, which is kept alive as long as the process."""


@dataclass
class OwnAddressConfig(TorchConfig):  # type: ignore[misc]  # Ray Train has no types
    """Ray Train's configuration of torch, with a backend that listens on the nodes' own addresses."""

    @property
    def backend_cls(self) -> type[OwnAddressBackend]:
        """The backend's class, for Ray Train."""
        return OwnAddressBackend


class OwnAddressBackend(_TorchBackend):  # type: ignore[misc]  # the same
    """Sets up torch's process group after Ray Train has started the workers."""

    def on_start(self, worker_group: Any, backend_config: OwnAddressConfig) -> None:
        """Opens the store on the first worker, and lets all workers join; Ray Train's controller calls this."""
        backend = backend_config.backend or ("nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo")
        worker_group.execute(_set_torch_distributed_env_vars)
        address, port = worker_group.execute_single(0, open_store)
        join_tasks = [
            worker_group.execute_single_async(
                rank,
                join_process_group,
                backend=backend,
                world_rank=rank,
                world_size=len(worker_group),
                address=address,
                port=port,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(join_tasks)


def open_store() -> tuple[str, int]:
    """Opens a store on this node's address; returns its address and port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = int(listener.getsockname()[1])
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    SHARED[:] = [store]
    return address, port


def join_process_group(
    *, backend: str, world_rank: int, world_size: int, address: str, port: int, timeout_s: float
) -> None:
    """Joins torch's process group through the store at an address."""
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
    """The name of the network interface of this machine that has an address.

    Raises:
        LookupError: no interface has it.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return str(name)
    raise LookupError(f"no network interface of this machine has the address {address}")
