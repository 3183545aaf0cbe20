"""`raylign bench serve --clients N`: what one token costs on its way to one of many clients that stream.

The model has one layer and random weights, so that nearly all of the work is that of passing tokens on. The servers
take turns, so that a machine that slows down slows all of them. Of each server and process group:

    engine    the processes that compute tokens (vLLM's EngineCore, and its workers if it has any)
    replica   the process that asks it, and turns tokens into server-sent events
    ingress   the process that checks requests and passes events on (of plain vLLM, the replica does all of it)
    proxy     the process that listens (Ray Serve's)
    ray       what else Ray runs: raylet, controller, agents, the command itself

`cpu_s_per_1000_tokens` is what the operating system counts of each group. `share` says, by parts of the source, what
the processes on the way of a token do with it; it comes from a round of its own in which `py-spy` looks at them (it is
a dependency of `ray[default]`), so that looking disturbs no figure.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from serving.bench import Server, headers, quantiles, question

HIDDEN = 128
"""Width of the model: its output head, which knows all words of the tokenizer, is nearly all that it computes."""
LOOKS_PER_S = 50
SAID = re.compile(rb'"content":"[^"]')
"""In an event that holds a text."""
GROUPS = {
    "engine": r"VLLM::|multiprocessing\.spawn",
    "proxy": r"ProxyActor",
    "ingress": r"ServeReplica:[^:]*:(ingress|OpenAiIngress)",
    "replica": r"ServeReplica:|vllm\.entrypoints",
}
"""By what a process calls itself; the first that fits. All else is `ray`."""
PARTS = {
    "": r"^serving/.*",
    "vllm": r"^vllm/",
    "ray_serve_llm": r"^ray/llm/",
    "ray_serve": r"^ray/serve/",
    "ray": r"^ray/",
    "http": r"^(uvicorn|starlette|fastapi|httptools|anyio)/",
}
"""Of the source, by the file of the innermost function that belongs to one; ours are told by their files. All else is
`event_loop`."""


def make_model(folder: Path, tokenizer: str) -> Path:
    """A model of one layer with random weights that reads and writes with the tokenizer of another one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class StreamLoad:
    """What is asked in one round of one server."""

    clients: int
    requests: int
    tokens: int


@dataclass(kw_only=True)
class StreamFigures:
    """What was seen of one server."""

    tokens_per_second: list[float] = field(default_factory=list)
    """Of each round."""
    first_s: list[float] = field(default_factory=list)
    """Until the first text, of each request."""
    between_s: list[float] = field(default_factory=list)
    """Between two events of a stream; 0 for those that come together."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each group of processes."""
    tokens: int = 0
    events: int = 0
    arrivals: int = 0
    """How often events came, one or several at once."""
    failed: int = 0
    share: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each group of processes: what part of its time each part of the source takes."""

    def to_json(self) -> dict[str, Any]:
        cpu = {group: round(1000 * seconds / max(1, self.tokens), 4) for group, seconds in sorted(self.cpu_s.items())}
        return {
            "tokens_per_second": round(statistics.median(self.tokens_per_second), 1) if self.tokens_per_second else 0.0,
            **quantiles("between_tokens_", self.between_s),
            **quantiles("first_token_", self.first_s),
            "events_per_arrival": round(self.events / max(1, self.arrivals), 2),
            "cpu_s_per_1000_tokens": cpu | {"all": round(1000 * sum(self.cpu_s.values()) / max(1, self.tokens), 4)},
            "failed": self.failed,
            **({"share": self.share} if self.share else {}),
        }


async def measure_streams(servers: list[Server], load: StreamLoad, rounds: int) -> dict[str, Any]:
    """All rounds of all servers, and then one of each in which it is looked what their processes do."""
    figures = {server.name: StreamFigures() for server in servers}
    for server in servers:
        await stream_round(server, load, StreamFigures())  # to warm up
    for number in range(rounds):
        for server in servers:
            seen = figures[server.name]
            await stream_round(server, load, seen)
            rate = seen.tokens_per_second[-1]
            print(f"round {number + 1}/{rounds}  {server.name:6} {rate:.0f} tokens/s", flush=True)
    for server in servers:
        print(f"looking at the processes of {server.name} …", flush=True)
        with looks(server.process) as share:
            await stream_round(server, load, StreamFigures())
        figures[server.name].share = share
    return {name: seen.to_json() for name, seen in figures.items()} | {"clients": load.clients, "tokens": load.tokens}


async def stream_round(server: Server, load: StreamLoad, seen: StreamFigures) -> None:
    """Has all clients ask at once, each again when it has its answer, until all requests are done."""
    left = iter(range(load.requests))

    async def client() -> None:
        for _ in left:
            await _stream(server, load.tokens, seen)

    before, failed, started = cpu_s(server.process), seen.failed, time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.clients)))
    elapsed_s, after = time.perf_counter() - started, cpu_s(server.process)
    tokens = load.tokens * (load.requests - (seen.failed - failed))
    seen.tokens += tokens
    seen.tokens_per_second.append(tokens / elapsed_s)
    for group, seconds in after.items():
        seen.cpu_s[group] = seen.cpu_s.get(group, 0.0) + seconds - before.get(group, 0.0)


async def _stream(server: Server, num_tokens: int, seen: StreamFigures) -> None:
    """One streamed chat, read as bytes: what a client's library costs belongs to no server."""
    address = urlsplit(server.url)
    body = json.dumps(question(server, num_tokens)).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {address.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers(server).items()),
    ]
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        is_whole = False
        rest, last = b"", None
        while data := await reader.read(2**16):
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            num_said = sum(SAID.search(event) is not None for event in events)
            is_whole = is_whole or b"data: [DONE]" in data
            if not num_said:
                continue
            if last is None:
                seen.first_s.append(now - started)
            else:
                seen.between_s.append(now - last)
            seen.between_s += [0.0] * (num_said - 1)
            seen.events += num_said
            seen.arrivals += 1
            last = now
        seen.failed += not is_whole
    finally:
        writer.close()


def _processes(root: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's processes, with their groups."""
    command = psutil.Process(root)
    for process in (command, *command.children(recursive=True)):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        yield next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "ray"), process


def cpu_s(root: int) -> dict[str, float]:
    """CPU seconds that each group of a server's processes has taken so far."""
    taken: dict[str, float] = {}
    for group, process in _processes(root):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        taken[group] = taken.get(group, 0.0) + times.user + times.system
    return taken


@contextmanager
def looks(root: int) -> Iterator[dict[str, dict[str, float]]]:
    """What the processes on the way of a token do meanwhile; filled after the `with` block, empty if forbidden."""
    from tempfile import TemporaryDirectory

    share: dict[str, dict[str, float]] = {}
    spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if spy is None:
        print("py-spy is not installed, so there is no share of each part", flush=True)
        yield share
        return
    with TemporaryDirectory(prefix="raylign-looks-") as folder:
        lookers = {}
        for group, process in _processes(root):
            if group in ("ray", "engine"):
                continue
            file = Path(folder) / f"{group}-{process.pid}"
            command = [spy, "record", "--pid", str(process.pid), "--rate", str(LOOKS_PER_S)]
            command += ["--format", "raw", "--output", str(file)]
            looker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            lookers[file] = group, looker
        try:
            yield share
        finally:
            for _, looker in lookers.values():
                looker.send_signal(signal.SIGINT)  # it then writes what it has seen
                looker.wait()
        counts: dict[str, Counter[str]] = {}
        for file, (group, _) in lookers.items():
            if file.is_file():
                counts.setdefault(group, Counter()).update(parts_of_stacks(file.read_text(errors="replace")))
        for group, parts in counts.items():
            share[group] = {name: round(count / parts.total(), 3) for name, count in parts.most_common()}


def parts_of_stacks(text: str) -> Counter[str]:
    """How often each part of the source was at work, from lines of `outer (file:line);inner (file:line) COUNT`."""
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit():
            counts[_part(stack)] += int(count)
    return counts


def _part(stack: str) -> str:
    for call in reversed(stack.split(";")):
        file = call.rpartition("(")[2].partition("site-packages/")
        path = file[2] or file[0]
        for part, pattern in PARTS.items():
            if found := re.search(pattern, path):
                return part or found[0].partition(":")[0]
    return "event_loop"
