"""The benchmark's arithmetic; the servers themselves are measured by hand."""

from __future__ import annotations

import asyncio
import time

import pytest

from serving.bench import Load, Taken, bench, figures, together

LOAD = Load(requests=4, concurrency=2, tokens=8)


def test_overhead_is_the_median_over_rounds_and_told_apart_from_that_of_ray_serve() -> None:
    found = {
        "vllm": Taken(rates=[10, 10, 10], seconds=[0.1, 0.2, 0.3], first=[0.05]),
        "ray": Taken(rates=[8, 8, 5], seconds=[0.2, 0.25, 0.3], first=[0.06]),
        "ours": Taken(rates=[7.6, 7.2, 5], seconds=[0.2, 0.26, 0.4], first=[0.07], failed=1),
    }
    found |= {f"light_{name}": taken for name, taken in found.items()}
    told = figures(found, LOAD)
    assert told["overhead"] == {"throughput": 0.05, "p50_ms": 10.0}
    assert told["overhead_of_ray_serve"] == {"throughput": 0.2, "p50_ms": 50.0}
    assert told["ours"]["failed"] == 1
    assert told["ours"]["requests_per_second"] == 7.2
    assert (told["ours"]["p50_s"], told["ours"]["p99_s"], told["ours"]["first_token_p50_s"]) == (0.26, 0.4, 0.07)


def test_what_nobody_answered_has_no_quantiles() -> None:
    assert figures({"ours": Taken(failed=3)}, LOAD)["ours"] == {"requests_per_second": 0.0, "failed": 3}


def test_no_more_is_asked_at_a_time_than_there_are_clients() -> None:
    now, most = 0, 0

    async def one() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1

    started = time.perf_counter()
    rate = asyncio.run(together([one() for _ in range(8)], LOAD))
    assert most == LOAD.concurrency
    assert 8 / (time.perf_counter() - started) <= rate <= 8 / (8 / LOAD.concurrency * 0.02)


def test_before_and_after_are_told_apart() -> None:
    taken = {name: Taken(rates=[rate], seconds=[0.1]) for name, rate in (("ray", 10), ("before", 9), ("ours", 9.5))}
    told = figures({**taken, **{f"light_{name}": one for name, one in taken.items()}}, LOAD)
    assert (told["overhead_before"]["throughput"], told["overhead"]["throughput"]) == (0.1, 0.05)


def test_there_is_one_benchmark() -> None:
    with pytest.raises(Exception, match="there is no benchmark 'train'; there is serve"):
        bench("train")
