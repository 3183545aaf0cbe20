"""Workers of a run meet where nobody else hears of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.rendezvous import interface_of

MEET = """
import sys
from multiprocessing import get_context

import psutil
import torch
import torch.distributed as dist

import ray.util
from cluster import rendezvous

ADDRESS = "127.0.0.1"


def worker(rank, where, told):
    ray.util.get_node_ip_address = lambda: ADDRESS
    if rank == 0:
        where = rendezvous.open_store()
        told.put(where)
    address, port = where
    rendezvous.join_process_group(
        backend="gloo", world_rank=rank, world_size=2, address=address, port=port, timeout_s=60
    )
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    sockets = psutil.Process().net_connections(kind="tcp")
    print(*(each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN), flush=True)
    dist.barrier()


if __name__ == "__main__":
    context = get_context("fork")  # of a process without threads, which has imported torch and Ray for both
    told = context.Queue()
    first = context.Process(target=worker, args=(0, None, told))
    first.start()
    second = context.Process(target=worker, args=(1, told.get(), told))
    second.start()
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
"""


def test_on_one_machine_store_and_gloo_listen_on_its_own_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("meet") / "meet.py"
    file.write_text(MEET)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heard = done.stdout.split()
    assert len(heard) >= 3, "the store, and gloo of both"
    assert {address.removeprefix("::ffff:") for address in heard} == {"127.0.0.1"}


def test_an_address_leads_to_its_interface() -> None:
    assert interface_of("127.0.0.1").startswith("lo")
    with pytest.raises(LookupError, match=r"192\.0\.2\.99"):
        interface_of("192.0.2.99")
