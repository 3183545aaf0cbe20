"""The benchmark's arithmetic; the servers themselves are measured by hand."""

from __future__ import annotations

import asyncio
import time

import pytest

from serving.bench.command import bench, summary
from serving.bench.load import Load, Timings, run_concurrently

LOAD = Load(requests=4, concurrency=2, tokens=8)


def test_overhead_is_the_median_over_rounds_and_told_apart_from_that_of_ray_serve() -> None:
    timings = {
        "vllm": Timings(rates=[10, 10, 10], seconds=[0.1, 0.2, 0.3], first_token_s=[0.05]),
        "ray": Timings(rates=[8, 8, 5], seconds=[0.2, 0.25, 0.3], first_token_s=[0.06]),
        "ours": Timings(rates=[7.6, 7.2, 5], seconds=[0.2, 0.26, 0.4], first_token_s=[0.07], num_failed=1),
    }
    timings |= {f"light_{name}": server_timings for name, server_timings in timings.items()}
    figures = summary(timings, LOAD)
    assert figures["overhead"] == {"throughput": 0.05, "p50_ms": 10.0}
    assert figures["overhead_of_ray_serve"] == {"throughput": 0.2, "p50_ms": 50.0}
    assert figures["ours"]["failed"] == 1
    assert figures["ours"]["requests_per_second"] == 7.2
    assert (figures["ours"]["p50_s"], figures["ours"]["p99_s"], figures["ours"]["first_token_p50_s"]) == (
        0.26,
        0.4,
        0.07,
    )


def test_what_nobody_answered_has_no_quantiles() -> None:
    assert summary({"ours": Timings(num_failed=3)}, LOAD)["ours"] == {"requests_per_second": 0.0, "failed": 3}


def test_no_more_is_asked_at_a_time_than_there_are_clients() -> None:
    num_requests, max_requests = 0, 0

    async def request() -> None:
        nonlocal num_requests, max_requests
        num_requests += 1
        max_requests = max(max_requests, num_requests)
        await asyncio.sleep(0.02)
        num_requests -= 1

    start_s = time.perf_counter()
    rate = asyncio.run(run_concurrently([request() for _ in range(8)], LOAD))
    assert max_requests == LOAD.concurrency
    assert 8 / (time.perf_counter() - start_s) <= rate <= 8 / (8 / LOAD.concurrency * 0.02)


def test_before_and_after_are_told_apart() -> None:
    rates = {"ray": 10, "before": 9, "ours": 9.5}
    timings = {name: Timings(rates=[rate], seconds=[0.1]) for name, rate in rates.items()}
    timings |= {f"light_{name}": server_timings for name, server_timings in timings.items()}
    figures = summary(timings, LOAD)
    assert (figures["overhead_before"]["throughput"], figures["overhead"]["throughput"]) == (0.1, 0.05)


def test_there_is_one_benchmark() -> None:
    with pytest.raises(Exception, match="there is no benchmark 'train'; there is serve"):
        bench("train")
