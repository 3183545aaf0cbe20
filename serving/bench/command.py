"""`raylign bench serve`: what the endpoint costs, beside plain vLLM and beside Ray Serve LLM alone.

Three servers of one model, with the same engine settings, take turns under the same load, so that a machine that slows
down affects all of them. Then the endpoint alone answers a mix of chats, rewards and feedback.

The last line of the output is one JSON object. Times are of whole requests, in seconds. `overhead` compares the
endpoint with Ray Serve LLM: the cost of keys, limits, versions and records beyond that of Ray Serve itself. Its
`throughput` is the fraction of the requests per second that is lost under the load; its `p50_ms` is the time added to
an answer of one token while the server has no other request (`light`), for which the servers take turns request by
request. `parts_ms` has the time of each step of a request, by the endpoint's own clock: finding the key, reading and
checking the body, finding the version, and passing the answer on to be recorded.

`--before FOLDER` also measures the endpoint of another checkout of this project, for a comparison in one run.
`--clients N` measures the way of one token instead: see `serving.bench.streams`.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.bench.load import Load, Timings, chat, feedback, rewards, run_concurrently
from serving.bench.servers import BenchSettings, Server, running_server

if TYPE_CHECKING:
    import httpx

LIGHT = "light_{}"
"""Name of the figures of a server's answers of one token, by the server's name."""
MAX_NUM_SEQS = 16


def bench(
    benchmark: Annotated[str, typer.Argument(help="serve")],
    model: Annotated[str, typer.Option(help="Model or checkpoint to serve.")] = "smollm2-135m-instruct",
    requests: Annotated[int, typer.Option(min=1, help="Chats in one round of one server.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients that ask at the same time.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every server.")] = 3,
    endpoint_alone: Annotated[bool, typer.Option("--alone", help="Measure the endpoint only.")] = False,
    baseline: Annotated[
        Path | None,
        typer.Option("--before", help="Another checkout of this project, whose endpoint is measured beside this one."),
    ] = None,
    clients: Annotated[
        int,
        typer.Option(
            min=0,
            help="Clients that stream at the same time from a model of one layer, in place of all else: what passing "
            "on one token costs, and where. MODEL then gives the tokenizer.",
        ),
    ] = 0,
) -> None:
    """Measures the endpoint under load, beside plain vLLM and Ray Serve LLM on this machine.

    Takes about five minutes on two cores. Prints requests per second, p50 and p99 of the seconds that a request takes,
    and the time to the first token.
    """
    if benchmark != "serve":
        raise typer.BadParameter(f"there is no benchmark {benchmark!r}; there is serve")
    from alignment.models.folders import model_source
    from serving.bench.streams import StreamLoad, make_model, measure_streams

    names = [] if endpoint_alone else ["vllm", "ray"]
    names += ["ours"] if baseline is None else ["before", "ours"]
    with tempfile.TemporaryDirectory(prefix="raylign-bench-") as name, ExitStack() as stack:
        folder, source = Path(name), model_source(model)
        if clients:
            source = str(make_model(folder / "model", source))
        settings = BenchSettings(
            model=source,
            folder=folder,
            max_num_seqs=clients or MAX_NUM_SEQS,
            has_rewards=not clients,
            baseline=baseline,
        )
        servers = [stack.enter_context(running_server(name, settings)) for name in names]
        if clients:
            streams = StreamLoad(clients=clients, requests=max(requests, clients), tokens=tokens)
            result = asyncio.run(measure_streams(servers, streams, rounds))
        else:
            load = Load(requests=requests, concurrency=concurrency, tokens=tokens)
            result = summary(asyncio.run(measure(servers, load, rounds)), load)
        result["parts_ms"] = step_times_ms(servers[-1])
    print(json.dumps(result))


async def measure(servers: list[Server], load: Load, rounds: int) -> dict[str, Timings]:
    """Runs all rounds; returns the timings by name. The first requests of each server only warm it up.

    Args:
        servers: the endpoint of this checkout is the last one.
        rounds: turns of every server.
    """
    import httpx

    names = [server.name for server in servers]
    timings = {name: Timings() for name in [*names, *map(LIGHT.format, names), "mixed_chat", "rewards", "feedback"]}
    limits = httpx.Limits(max_connections=4 * load.concurrency)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        for server in servers:
            await run_concurrently([chat(client, server, load, Timings()) for _ in range(2)], load)
        await measure_light_load(client, servers, load, timings)
        for number in range(rounds):
            for server in servers:
                rates = timings[server.name].rates
                chats = [chat(client, server, load, timings[server.name]) for _ in range(load.requests)]
                rates.append(await run_concurrently(chats, load))
                print(f"round {number + 1}/{rounds}  {server.name:5} {rates[-1]:.2f} requests/s", flush=True)
        await measure_mixed_load(client, servers[-1], load, timings)
    return timings


async def measure_light_load(
    client: httpx.AsyncClient, servers: list[Server], load: Load, timings: dict[str, Timings]
) -> None:
    """Sends chats with answers of one token, one at a time."""
    small_load = replace(load, tokens=1)
    for _ in range(2 * load.requests):
        for server in servers:
            await chat(client, server, small_load, timings[LIGHT.format(server.name)])
    for server in servers:
        light_timings = timings[LIGHT.format(server.name)]
        light_timings.rates.append(len(light_timings.seconds) / sum(light_timings.seconds))


async def measure_mixed_load(
    client: httpx.AsyncClient, server: Server, load: Load, timings: dict[str, Timings]
) -> None:
    """Sends chats, rewards and feedback at the same time."""
    ids: list[str] = []
    await run_concurrently([chat(client, server, load, Timings(), ids) for _ in range(4)], load)
    kinds: dict[str, Callable[[], Awaitable[None]]] = {
        "mixed_chat": lambda: chat(client, server, load, timings["mixed_chat"], ids),
        "rewards": lambda: rewards(client, server, timings["rewards"]),
        "feedback": lambda: feedback(client, server, ids, timings["feedback"]),
    }
    sequence = random.Random(0).choices(list(kinds), weights=(2, 1, 1), k=2 * load.requests)
    rate = await run_concurrently([kinds[kind]() for kind in sequence], load)
    for kind in kinds:
        timings[kind].rates.append(rate * sequence.count(kind) / len(sequence))


def step_times_ms(server: Server) -> dict[str, float]:
    """Mean time (milliseconds) of each step of a request at the endpoint, from its own metrics."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    text = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=60, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    totals = {sample.labels["part"]: sample.value for sample in samples if sample.name == "raylign_part_seconds_sum"}
    counts = {sample.labels["part"]: sample.value for sample in samples if sample.name == "raylign_part_seconds_count"}
    return {step: round(1000 * totals[step] / count, 3) for step, count in counts.items()}


def summary(timings: dict[str, Timings], load: Load) -> dict[str, Any]:
    """The figures of the last line."""
    figures: dict[str, Any] = {name: server_timings.to_json() for name, server_timings in timings.items()}
    for name, baseline, server in (
        ("overhead", "ray", "ours"),
        ("overhead_before", "ray", "before"),
        ("overhead_of_ray_serve", "vllm", "ray"),
    ):
        if baseline in timings and server in timings:
            figures[name] = {
                "throughput": _throughput_loss(timings[baseline], timings[server]),
                "p50_ms": _extra_latency_ms(timings[LIGHT.format(baseline)], timings[LIGHT.format(server)]),
            }
    return {**figures, "concurrency": load.concurrency, "tokens": load.tokens, "requests": load.requests}


def _throughput_loss(baseline: Timings, server: Timings) -> float:
    """The fraction of the baseline's requests per second that a server loses; the median over the rounds."""
    losses = [1 - rate / baseline_rate for baseline_rate, rate in zip(baseline.rates, server.rates, strict=True)]
    return round(statistics.median(losses), 4)


def _extra_latency_ms(baseline: Timings, server: Timings) -> float:
    return round(1000 * (statistics.median(server.seconds) - statistics.median(baseline.seconds)), 1)
