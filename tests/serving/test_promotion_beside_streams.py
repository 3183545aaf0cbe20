"""What a promotion of whole weights costs those who ask meanwhile, beside an answer of a minute (`-m slow -s`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.conftest import make_tokenizer, tiny_config
from tests.serving.conftest import Running, started

pytestmark = [pytest.mark.slow, pytest.mark.alone]
MODEL = "long"
LENGTH = 32768


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models as the tiny one, with room for answers of a minute."""
    from transformers import LlamaForCausalLM

    tokenizer, folders = make_tokenizer(), []
    for seed in range(3):
        torch.manual_seed(seed)
        config = tiny_config(tokenizer, max_position_embeddings=LENGTH, initializer_range=0.02)
        folders.append(tmp_path_factory.mktemp("long") / f"long-{seed}")
        LlamaForCausalLM(config).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


@contextmanager
def serving(weights: list[Path], folder: Path, replicas: int, *settings: str) -> Iterator[Running]:
    ours = (f"name={MODEL}", "dtype=fp32", "kv_cache_gib=0.2", f"limits.max_tokens={LENGTH - 100}", "max_num_seqs=16")
    number = (f"min_replicas={replicas}", f"max_replicas={replicas}")
    with started(weights[0], folder, *ours, *number, *settings) as running:
        yield running


@dataclass
class Short:
    """Short requests of many conversations, from a few clients that ask without a pause."""

    endpoint: Running
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    """When each began (seconds), how long it took, and the version that answered."""
    failed: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def ask(self, client: int) -> None:
        headers = {"authorization": f"Bearer {self.endpoint.keys['user']}"}
        with httpx.Client(headers=headers, timeout=300) as connection:
            for number in range(10**9):
                if self.done.is_set():
                    return
                turns = [{"role": "user", "content": f"fox {client} {number}"}]
                body = {"model": MODEL, "messages": turns, "max_tokens": 4, "ignore_eos": True}
                begun = time.monotonic()
                answer = connection.post(f"{self.endpoint.url}/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                else:
                    self.answers.append((begun, time.monotonic() - begun, answer.headers["x-model-version"]))

    def between(self, begin: float, end: float) -> list[float]:
        """Seconds of the requests that were in progress between two times, in order."""
        return sorted(took for begun, took, _ in self.answers if begun < end and begun + took > begin)


@contextmanager
def short_requests(endpoint: Running, clients: int = 2) -> Iterator[Short]:
    short = Short(endpoint)
    threads = [threading.Thread(target=short.ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield short
    finally:
        short.done.set()
        for thread in threads:
            thread.join()


class Stream(threading.Thread):
    """One long answer."""

    def __init__(self, endpoint: Running, tokens: int) -> None:
        super().__init__()
        self.endpoint, self.tokens = endpoint, tokens
        self.begun = threading.Event()
        self.seconds, self.chunks, self.version, self.ended_well = 0.0, 0, "", False
        self.fingerprints: set[str] = set()
        self.start()
        assert self.begun.wait(60)

    def run(self) -> None:
        turns = [{"role": "user", "content": "a long story"}]
        body = {"model": MODEL, "messages": turns, "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {self.endpoint.keys['user']}"}
        url, began = f"{self.endpoint.url}/v1/chat/completions", time.monotonic()
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as answer:
            self.version = answer.headers["x-model-version"]
            for line in answer.iter_lines():
                self.begun.set()
                self.chunks += line.startswith('data: {"id"')
                if '"system_fingerprint":"' in line:
                    self.fingerprints.add(line.split('"system_fingerprint":"')[1].split('"')[0])
                self.ended_well |= line == "data: [DONE]"
        self.seconds = time.monotonic() - began


def p99(seconds: list[float]) -> float:
    return seconds[int(0.99 * (len(seconds) - 1))]


def described(seconds: list[float]) -> str:
    figures = {"median": seconds[len(seconds) // 2], "p99": p99(seconds), "slowest": seconds[-1]}
    return ", ".join([f"{len(seconds)} requests", *(f"{name} {1000 * each:.0f} ms" for name, each in figures.items())])


def registered(endpoint: Running, folder: Path) -> int:
    answer = endpoint.ask("POST", "/v1/admin/versions", {"checkpoint": str(folder)})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["number"])


def promote(endpoint: Running, number: int, **body: Any) -> tuple[httpx.Response, float, float]:
    """The answer, and when it began and ended."""
    begun = time.monotonic()
    answer = endpoint.ask("POST", "/v1/admin/promote", {"version": number, **body})
    ended = time.monotonic()
    time.sleep(1)  # what waited meanwhile has ended now
    return answer, begun, ended


def tokens_of_a_minute(endpoint: Running) -> int:
    stream = Stream(endpoint, 2000)
    stream.join()
    return min(LENGTH - 200, int(2000 / stream.seconds * 75))


def test_with_two_replicas_nobody_notices(weights: list[Path], tmp_path: Path) -> None:
    with serving(weights, tmp_path, 2) as endpoint:
        number = registered(endpoint, weights[1])
        with short_requests(endpoint) as short:
            tokens = tokens_of_a_minute(endpoint)
            stream = Stream(endpoint, tokens)
            quiet = time.monotonic()
            time.sleep(15)
            answer, begun, ended = promote(endpoint, number)
            assert answer.status_code == 200, answer.text
            stream.join()
            time.sleep(2)
        before, during = short.between(quiet, begun), short.between(begun, ended)
        print(f"\na stream of {stream.seconds:.0f} s ({stream.chunks} chunks), a promotion of {ended - begun:.1f} s")
        print(f"before: {described(before)}\nduring: {described(during)}; {len(short.failed)} failed")
        assert not short.failed
        assert stream.ended_well and (stream.version, stream.fingerprints) == ("1", {"1"})
        assert {version for _, _, version in short.answers} == {"1", str(number)}
        assert during[-1] < (ended - begun) / 4, "nobody waits for the stream"
        assert p99(during) <= 2 * p99(before)


def test_with_one_replica_little_is_lost_and_with_a_canary_nothing(weights: list[Path], tmp_path: Path) -> None:
    with serving(weights, tmp_path, 1, "promotion_wait_s=5") as endpoint:
        second, third = registered(endpoint, weights[1]), registered(endpoint, weights[2])
        with short_requests(endpoint) as short:
            tokens = tokens_of_a_minute(endpoint)
            quiet = time.monotonic()
            time.sleep(5)
            answer, begun, ended = promote(endpoint, second)
            assert answer.status_code == 200, answer.text
            print(f"\nno stream, before: {described(short.between(quiet, begun))}")
            print(f"a promotion of {ended - begun:.1f} s: {described(short.between(begun, ended))}")

            stream = Stream(endpoint, tokens)
            answer, begun, ended = promote(endpoint, third)
            assert answer.status_code == 409 and "did not end within 5 s" in answer.text
            print(f"beside a stream, given up after {ended - begun:.1f} s: {described(short.between(begun, ended))}")

            answer, begun, ended = promote(endpoint, third, canary=0.0)
            assert answer.status_code == 200, answer.text
            print(f"a canary started in {ended - begun:.1f} s: {described(short.between(begun, ended))}")
            before = short.between(begun - 5, begun)
            if not stream.is_alive():
                stream = Stream(endpoint, tokens)
            answer, begun, ended = promote(endpoint, third)
            assert answer.status_code == 200, answer.text
            stream.join()
            time.sleep(1)
            during = short.between(begun, ended)
            print(f"the canary promoted in {ended - begun:.1f} s beside the stream: {described(during)}")
        assert not short.failed
        assert stream.ended_well and stream.fingerprints == {str(second)}
        assert during[-1] < max(2.0, (ended - begun) / 4), before
        assert endpoint.ask("GET", "/v1/admin/versions").json()["state"]["current"] == third
