"""`raylign bench serve`: what the endpoint costs, beside plain vLLM and beside Ray Serve LLM as it comes.

Three servers of one model, with the same engine settings, take turns under the same load, so that a machine that slows
down slows all of them. Then ours alone answers a mix of chats, rewards and feedback.

The last line printed is one JSON object. Seconds are of whole requests; `overhead` is ours against Ray Serve LLM: what
keys, limits, versions and the keeping of answers cost beyond what Ray Serve itself does. Its `throughput` is lost under
the load; its `p50_ms` is added to an answer of one token that nobody else is in the way of (`light`), for which the
servers take turns too, request by request. `parts_ms` says what each part takes of one request by the endpoint's own
clock: finding the key, reading and checking the body, finding the version, and handing the answer to what writes it
down.

`--before FOLDER` has the endpoint of another checkout of this project take its turns too, for before and after in one
run. `--clients N` measures the path of one token instead: see `serving.bench_streams`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignment.environment import IDLE_THREADS
from alignment.errors import ServingError

if TYPE_CHECKING:
    import httpx

START_TIMEOUT_S = 300.0
LIGHT = "light_{}"
MAX_NUM_SEQS = 16
RAYLIGN = ("-m", "alignment.cli")
OURS = ("ours", "before")
"""The endpoint of this checkout, and that of another one."""
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "How does a bicycle stay upright?",
    "What should I cook with rice and eggs?",
    "Explain what a prime number is.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
)


def bench(
    what: Annotated[str, typer.Argument(help="serve")],
    model: Annotated[str, typer.Option(help="Model or checkpoint to serve.")] = "smollm2-135m-instruct",
    requests: Annotated[int, typer.Option(min=1, help="Chats in one round of one server.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients that ask at the same time.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every server.")] = 3,
    alone: Annotated[bool, typer.Option("--alone", help="Measure ours only.")] = False,
    before: Annotated[
        Path | None, typer.Option(help="Another checkout of this project, whose endpoint is measured beside this one.")
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
    if what != "serve":
        raise typer.BadParameter(f"there is no benchmark {what!r}; there is serve")
    from alignment.models.folders import model_source

    names = [] if alone else ["vllm", "ray"]
    if before is not None:
        names.append("before")
    with tempfile.TemporaryDirectory(prefix="raylign-bench-") as name, ExitStack() as running:
        folder, source = Path(name), model_source(model)
        if clients:
            from serving.bench_streams import StreamLoad, make_model, measure_streams

            source = str(make_model(folder / "model", source))
        settings = BenchSettings(
            model=source, folder=folder, max_num_seqs=clients or MAX_NUM_SEQS, rates=not clients, before=before
        )
        servers = [running.enter_context(server(name, settings)) for name in [*names, "ours"]]
        if clients:
            streams = StreamLoad(clients=clients, requests=max(requests, clients), tokens=tokens)
            result = asyncio.run(measure_streams(servers, streams, rounds))
        else:
            load = Load(requests=requests, concurrency=concurrency, tokens=tokens)
            result = figures(asyncio.run(measured(servers, load, rounds)), load)
        result["parts_ms"] = parts_of(servers[-1])
    print(json.dumps(result))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked."""

    requests: int
    concurrency: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What all servers have in common."""

    model: str
    """Folder or hub id."""
    folder: Path
    """For logs, and for what endpoints keep."""
    max_num_seqs: int
    rates: bool
    """Whether ours answers requests for rewards too."""
    before: Path | None = None
    """Another checkout of this project."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    name: str
    url: str
    model: str
    key: str | None
    process: int
    """Id of the process that started all of its others."""


@dataclass(kw_only=True)
class Taken:
    """How long the requests of one kind took."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Until the first token."""
    rates: list[float] = field(default_factory=list)
    """Requests per second, of each round."""
    failed: int = 0

    def told(self) -> dict[str, float | int]:
        return {
            "requests_per_second": round(statistics.median(self.rates), 3) if self.rates else 0.0,
            **quantiles("", self.seconds),
            **(quantiles("first_token_", self.first) if self.first else {}),
            "failed": self.failed,
        }


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, as fields whose names begin alike."""
    if not seconds:
        return {}
    in_order = sorted(seconds)
    last = in_order[min(len(in_order) - 1, int(len(in_order) * 0.99))]
    return {f"{name}p50_s": round(statistics.median(in_order), 4), f"{name}p99_s": round(last, 4)}


@contextmanager
def server(name: str, settings: BenchSettings) -> Iterator[Server]:
    """Starts one of the servers, and ends it afterwards.

    Raises:
        ServingError: it does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    is_ours = name in OURS
    tree = settings.before if name == "before" else None
    commands: dict[str, Callable[[], list[str]]] = {
        "vllm": lambda: ["-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(settings, port)],
        "ray": lambda: ["-m", "serving.bench_ray", settings.model, str(port), str(settings.max_num_seqs)],
        **dict.fromkeys(OURS, lambda: [*RAYLIGN, "serve", settings.model, *our_settings(name, settings, port)]),
    }
    log = settings.folder / f"{name}.log"
    key = _key(name, settings, tree) if is_ours else None
    print(f"Starting {name} …", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *commands[name]()], stdout=output, stderr=subprocess.STDOUT, **_environment(tree)
        )
    try:
        path = "/readyz" if is_ours else {"vllm": "/health", "ray": "/v1/models"}[name]
        _wait_for(process, url + path, log)
        yield Server(name=name, url=url, model="bench", key=key, process=process.pid)
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def vllm_arguments(settings: BenchSettings, port: int) -> list[str]:
    """Of vLLM's own server: the engine settings that ours has too."""
    values = {
        **engine_settings(settings.max_num_seqs),
        **{"model": settings.model, "served-model-name": "bench", "host": "127.0.0.1", "port": port},
    }
    flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-uvicorn-access-log"]
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + flags


def engine_settings(max_num_seqs: int) -> dict[str, int | str]:
    """Of all servers, as vLLM's flags."""
    from alignment.models.load import dtype_name

    return {
        "dtype": dtype_name("auto", "cpu"),
        "max-model-len": 1024,
        "max-num-seqs": max_num_seqs,
        "kv-cache-memory-bytes": 2**29,
    }


def our_settings(name: str, settings: BenchSettings, port: int) -> list[str]:
    """Settings of our endpoint."""
    from alignment.models.load import number_format

    return [
        f"port={port}",
        f"folder={settings.folder / name}",
        f"feedback.database={_database(name, settings)}",
        "name=bench",
        f"dtype={number_format('auto', 'cpu')}",
        "max_model_len=1024",
        f"max_num_seqs={settings.max_num_seqs}",
        "kv_cache_gib=0.5",
        f"rewards.min_replicas={int(settings.rates)}",
        f"rewards.reference={settings.model}",
        "feedback.record=true",
    ]


def _database(name: str, settings: BenchSettings) -> str:
    return f"sqlite:///{settings.folder}/{name}.sqlite"


def _key(name: str, settings: BenchSettings, tree: Path | None) -> str:
    """A key of ours."""
    create = ["keys", "create", "--name", "bench", "--role", "admin", "--database", _database(name, settings)]
    command = [sys.executable, *RAYLIGN, *create]
    made: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, **_environment(tree)
    )
    if made.returncode:
        raise ServingError(f"no key could be made:\n{made.stdout[-1000:]}{made.stderr[-1000:]}")
    return made.stdout.strip().splitlines()[-1]


def _environment(tree: Path | None) -> dict[str, Any]:
    """Of a server's process.

    Args:
        tree: another checkout of this project, from which it shall run.
    """
    threads = str(len(os.sched_getaffinity(0)))
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1"}
    variables["RAY_worker_niceness"] = "0"  # as ours sets it: else the clients here would go before Ray Serve LLM
    if tree is None:
        return {"env": variables}
    own = {name: value for name, value in variables.items() if IDLE_THREADS.get(name) != value}  # it sets what it knows
    return {"env": {**own, "PYTHONPATH": str(tree)}, "cwd": tree}


async def measured(servers: list[Server], load: Load, rounds: int) -> dict[str, Taken]:
    """All rounds; the first requests of each server are for warming up."""
    import httpx

    names = [one.name for one in servers]
    found = {name: Taken() for name in [*names, *map(LIGHT.format, names), "mixed_chat", "rewards", "feedback"]}
    limits = httpx.Limits(max_connections=4 * load.concurrency)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        for one in servers:
            await together([chat(client, one, load, Taken()) for _ in range(2)], load)
        await light(client, servers, load, found)
        for number in range(rounds):
            for one in servers:
                taken = found[one.name]
                taken.rates.append(await together([chat(client, one, load, taken) for _ in range(load.requests)], load))
                print(f"round {number + 1}/{rounds}  {one.name:5} {taken.rates[-1]:.2f} requests/s", flush=True)
        await mixed(client, servers[-1], load, found)
    return found


async def light(client: httpx.AsyncClient, servers: list[Server], load: Load, found: dict[str, Taken]) -> None:
    """Answers of one token, one at a time."""
    small = replace(load, tokens=1)
    for _ in range(2 * load.requests):
        for one in servers:
            taken = found[LIGHT.format(one.name)]
            await chat(client, one, small, taken)
    for one in servers:
        taken = found[LIGHT.format(one.name)]
        taken.rates.append(len(taken.seconds) / sum(taken.seconds))


async def mixed(client: httpx.AsyncClient, ours: Server, load: Load, found: dict[str, Taken]) -> None:
    """Chats, rewards and feedback at once."""
    ids: list[str] = []
    await together([chat(client, ours, load, Taken(), ids) for _ in range(4)], load)
    kinds: list[Callable[[], Awaitable[None]]] = [
        lambda: chat(client, ours, load, found["mixed_chat"], ids),
        lambda: rewards(client, ours, found["rewards"]),
        lambda: feedback(client, ours, ids, found["feedback"]),
    ]
    draw = random.Random(0)
    chosen = draw.choices(range(3), weights=(2, 1, 1), k=2 * load.requests)
    rate = await together([kinds[kind]() for kind in chosen], load)
    for kind, name in enumerate(("mixed_chat", "rewards", "feedback")):
        found[name].rates.append(rate * chosen.count(kind) / len(chosen))


async def together(asking: list[Awaitable[None]], load: Load) -> float:
    """Does all of it, so many at a time; returns how many per second."""
    room = asyncio.Semaphore(load.concurrency)

    async def one(work: Awaitable[None]) -> None:
        async with room:
            await work

    started = time.perf_counter()
    await asyncio.gather(*map(one, asking))
    return len(asking) / (time.perf_counter() - started)


async def chat(
    client: httpx.AsyncClient, server: Server, load: Load, taken: Taken, ids: list[str] | None = None
) -> None:
    """One streamed chat of a fixed number of tokens."""
    body = question(server, load.tokens)
    started, first, id = time.perf_counter(), None, ""
    async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers(server)) as reply:
        if reply.status_code != 200:
            taken.failed += 1
            return
        async for line in reply.aiter_lines():
            if first is None and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - started
            if not id and line.startswith("data: {"):
                id = json.loads(line.removeprefix("data: "))["id"]
    if ids is not None:  # now that it has ended: what is still being answered cannot be judged
        ids[:] = [*ids[-99:], id]
    taken.seconds.append(time.perf_counter() - started)
    taken.first.append(taken.seconds[-1] if first is None else first)


def question(server: Server, num_tokens: int) -> dict[str, Any]:
    """Body of a request for a streamed chat of a fixed number of tokens."""
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": f"{random.choice(QUESTIONS)} ({random.randrange(10**6)})"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0.7,
    }


async def rewards(client: httpx.AsyncClient, server: Server, taken: Taken) -> None:
    """Two answers rated."""
    question = random.choice(QUESTIONS)
    turns = [{"role": "user", "content": question}]
    item = {"messages": turns, "completions": ["I do not know.", "That is a good question: it depends."]}
    await _post(client, server, "/v1/rewards", {"items": [item]}, taken)


async def feedback(client: httpx.AsyncClient, server: Server, ids: list[str], taken: Taken) -> None:
    """One thumb."""
    body = {"kind": "thumb", "id": random.choice(ids), "up": random.random() < 0.5}
    await _post(client, server, "/v1/feedback", body, taken)


async def _post(client: httpx.AsyncClient, server: Server, path: str, body: dict[str, Any], taken: Taken) -> None:
    started = time.perf_counter()
    reply = await client.post(server.url + path, json=body, headers=headers(server))
    taken.failed += reply.status_code != 200
    taken.seconds.append(time.perf_counter() - started)


def parts_of(server: Server) -> dict[str, float]:
    """Mean milliseconds of each part of our endpoint, from its own figures."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    text = httpx.get(f"{server.url}/metrics", headers=headers(server), timeout=60, trust_env=False).text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    value = {(each.name, each.labels.get("part")): each.value for each in samples}
    parts = [each.labels["part"] for each in samples if each.name == "raylign_part_seconds_count"]
    mean = {part: value["raylign_part_seconds_sum", part] / value["raylign_part_seconds_count", part] for part in parts}
    return {part: round(1000 * seconds, 3) for part, seconds in mean.items()}


def figures(found: dict[str, Taken], load: Load) -> dict[str, Any]:
    """The last line."""
    told: dict[str, Any] = {name: taken.told() for name, taken in found.items()}
    for name, after in (("overhead", "ours"), ("overhead_before", "before")):
        if "ray" in found and after in found:
            told[name] = {
                "throughput": _loss(found["ray"], found[after]),
                "p50_ms": _later_ms(found["light_ray"], found[LIGHT.format(after)]),
            }
    if "vllm" in found and "ray" in found:
        told["overhead_of_ray_serve"] = {
            "throughput": _loss(found["vllm"], found["ray"]),
            "p50_ms": _later_ms(found["light_vllm"], found["light_ray"]),
        }
    return {**told, "concurrency": load.concurrency, "tokens": load.tokens, "requests": load.requests}


def _loss(before: Taken, after: Taken) -> float:
    """Median over the rounds of what part of the requests per second is lost."""
    parts = [1 - later / earlier for earlier, later in zip(before.rates, after.rates, strict=True)]
    return round(statistics.median(parts), 4)


def _later_ms(before: Taken, after: Taken) -> float:
    return round(1000 * (statistics.median(after.seconds) - statistics.median(before.seconds)), 1)


def headers(server: Server) -> dict[str, str]:
    """What a request has to bring."""
    return {"Authorization": f"Bearer {server.key}"} if server.key else {}


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise ServingError(f"a server did not start:\n{log.read_text(errors='replace')[-2000:]}")
