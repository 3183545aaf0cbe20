"""`raylign bench serve --clients N`: what one token costs on its way to one of many clients that stream.

The model has one layer and random weights, so nearly all of the work is passing tokens on. The servers take turns, so
that a machine that slows down affects all of them.

`cpu_s_per_1000_tokens` is the CPU time of each group of processes (see `serving.bench.profile`), as the operating
system counts it. `share` is the fraction of its time that each area of the source takes in a process on a token's way.
It is measured in a round of its own, with `py-spy` (a dependency of `ray[default]`), so that the profiler disturbs no
other figure.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving.bench.load import quantiles, question
from serving.bench.profile import cpu_s, profile
from serving.bench.servers import Server

HIDDEN_SIZE = 128
"""Width of the model. Nearly all of its computation is the output head, which is as large as the vocabulary."""
TEXT = re.compile(rb'"content":"[^"]')
"""Matches an event that holds a text."""


def make_model(folder: Path, tokenizer_path: str) -> Path:
    """Makes a model of one layer with random weights, and the tokenizer of another model; returns its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class StreamLoad:
    """The requests in one round of one server."""

    clients: int
    """Requests in progress at a time."""
    requests: int
    tokens: int
    """Tokens of every answer."""


@dataclass(kw_only=True)
class StreamFigures:
    """The figures of one server."""

    tokens_per_second: list[float] = field(default_factory=list)
    """Of each round."""
    first_s: list[float] = field(default_factory=list)
    """Of each request, until the first text."""
    gaps_s: list[float] = field(default_factory=list)
    """Between two events of a stream; 0 for events that arrive together."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each group of processes."""
    num_tokens: int = 0
    num_events: int = 0
    num_arrivals: int = 0
    """How often events arrived, one or several at once."""
    num_failed: int = 0
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each group of processes, the fraction of its time that each area of the source takes."""

    def to_json(self) -> dict[str, Any]:
        """The figures of the benchmark's last line."""
        thousands = max(1, self.num_tokens) / 1000
        cpu = {group: round(seconds / thousands, 4) for group, seconds in sorted(self.cpu_s.items())}
        return {
            "tokens_per_second": round(statistics.median(self.tokens_per_second), 1) if self.tokens_per_second else 0.0,
            **quantiles("between_tokens_", self.gaps_s),
            **quantiles("first_token_", self.first_s),
            "events_per_arrival": round(self.num_events / max(1, self.num_arrivals), 2),
            "cpu_s_per_1000_tokens": cpu | {"all": round(sum(self.cpu_s.values()) / thousands, 4)},
            "failed": self.num_failed,
            **({"share": self.shares} if self.shares else {}),
        }


async def measure_streams(servers: list[Server], load: StreamLoad, rounds: int) -> dict[str, Any]:
    """Runs all rounds of all servers, and then one more of each in which its processes are profiled."""
    figures = {server.name: StreamFigures() for server in servers}
    for server in servers:
        await stream_round(server, load, StreamFigures())  # to warm up
    for number in range(rounds):
        for server in servers:
            await stream_round(server, load, figures[server.name])
            rate = figures[server.name].tokens_per_second[-1]
            print(f"round {number + 1}/{rounds}  {server.name:6} {rate:.0f} tokens/s", flush=True)
    for server in servers:
        print(f"looking at the processes of {server.name} …", flush=True)
        with profile(server.process) as shares:
            await stream_round(server, load, StreamFigures())
        figures[server.name].shares = shares
    results = {name: server_figures.to_json() for name, server_figures in figures.items()}
    return results | {"clients": load.clients, "tokens": load.tokens}


async def stream_round(server: Server, load: StreamLoad, figures: StreamFigures) -> None:
    """Lets all clients send a request at once, and the next one after each answer, until all requests are done."""
    requests = iter(range(load.requests))

    async def client() -> None:
        for _ in requests:
            await _stream(server, load.tokens, figures)

    start_cpu_s, start_failed, start_s = cpu_s(server.process), figures.num_failed, time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.clients)))
    elapsed_s, end_cpu_s = time.perf_counter() - start_s, cpu_s(server.process)
    num_tokens = load.tokens * (load.requests - (figures.num_failed - start_failed))
    figures.num_tokens += num_tokens
    figures.tokens_per_second.append(num_tokens / elapsed_s)
    for group, seconds in end_cpu_s.items():
        figures.cpu_s[group] = figures.cpu_s.get(group, 0.0) + seconds - start_cpu_s.get(group, 0.0)


async def _stream(server: Server, num_tokens: int, figures: StreamFigures) -> None:
    """Sends one streamed chat and reads bytes, so that no server is charged for a client library."""
    address = urlsplit(server.url)
    body = json.dumps(question(server, num_tokens)).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {address.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in server.headers.items()),
    ]
    start_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        is_complete = False
        rest, last_arrival_s = b"", None
        while data := await reader.read(2**16):
            arrival_s = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            num_texts = sum(TEXT.search(event) is not None for event in events)
            is_complete = is_complete or b"data: [DONE]" in data
            if not num_texts:
                continue
            if last_arrival_s is None:
                figures.first_s.append(arrival_s - start_s)
            else:
                figures.gaps_s.append(arrival_s - last_arrival_s)
            figures.gaps_s += [0.0] * (num_texts - 1)
            figures.num_events += num_texts
            figures.num_arrivals += 1
            last_arrival_s = arrival_s
        figures.num_failed += not is_complete
    finally:
        writer.close()
