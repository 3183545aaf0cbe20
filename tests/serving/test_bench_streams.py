"""What a run of many streams counts; the servers themselves are measured by hand."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from alignment.models.folders import bundled
from serving.bench.profile import count_areas, cpu_s, profile
from serving.bench.servers import Server
from serving.bench.streams import StreamFigures, StreamLoad, make_model, stream_round

EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
START = b"HTTP/1.1 200 OK\r\n\r\n"
STACKS = """\
<module> (worker.py:300);run (asyncio/runners.py:44);streamed (serving/http/routes/openai.py:260);loads (decoder.py:3) 3
run (runners.py:44);_sent (serving/replica/backend.py:140);__anext__ (ray/serve/handle.py:7);wait (asyncio/tasks.py:1) 5
run (asyncio/runners.py:44);select (selectors.py:469) 2
told (/work/.venv/lib/python3.11/site-packages/vllm/v1/engine/async_llm.py:12) 1
not a stack
"""


def test_a_look_counts_for_the_innermost_function_whose_part_is_known() -> None:
    assert count_areas(STACKS) == {"serving/http/routes/openai.py": 3, "ray_serve": 5, "event_loop": 2, "vllm": 1}


def test_events_are_counted_as_a_client_sees_them_arrive() -> None:
    """Of five events with a text two come together; the first, which only opens the answer, has none."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Authorization: Bearer secret" in head
        end_cpu_s = time.process_time() + 0.03
        while time.process_time() < end_cpu_s:  # the system counts CPU time in steps of 0.01 s
            pass
        together = EVENT % b"b" + EVENT % b"c"
        for part in (START, EVENT % b"", EVENT % b"a", together, EVENT % b"d", EVENT % b"e" + b"data: [DONE]\n\n"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()

    async def scene() -> StreamFigures:
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        server = Server(name="ours", url=f"http://127.0.0.1:{port}", model="m", key="secret", process=os.getpid())
        figures = StreamFigures()
        await stream_round(server, StreamLoad(clients=2, requests=3, tokens=5), figures)
        listener.close()
        return figures

    figures = asyncio.run(scene())
    assert (figures.num_failed, figures.num_tokens, figures.num_events, figures.num_arrivals) == (0, 15, 15, 12)
    assert len(figures.first_s) == 3 and len(figures.gaps_s) == 12
    assert figures.gaps_s.count(0.0) == 3 and max(figures.gaps_s) >= 0.04
    result = figures.to_json()
    assert result["events_per_arrival"] == 1.25 and result["tokens_per_second"] > 0
    assert result["cpu_s_per_1000_tokens"]["all"] > 0


def test_an_answer_that_breaks_off_has_failed() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(START + EVENT % b"a")
        writer.close()

    async def scene() -> StreamFigures:
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        figures = StreamFigures()
        server = Server(name="ours", url=url, model="m", key=None, process=os.getpid())
        await stream_round(server, StreamLoad(clients=1, requests=2, tokens=5), figures)
        listener.close()
        return figures

    assert (figures := asyncio.run(scene())).num_failed == 2 and figures.num_tokens == 0


def test_the_processes_of_a_server_are_told_by_their_names() -> None:
    async def scene() -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        busy = "import re, time\nend = time.time() + 3\nwhile time.time() < end: re.compile('a').match('b')"
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", busy, "vllm.entrypoints")
        assert child.pid is not None
        with profile(child.pid) as shares:
            await asyncio.sleep(2)
        seconds = cpu_s(child.pid)
        child.kill()
        await child.wait()
        return seconds, shares

    seconds, shares = asyncio.run(scene())
    assert seconds.keys() == {"replica"} and seconds["replica"] > 0.1
    if shares:  # looking into other processes may be forbidden
        assert sum(shares["replica"].values()) == pytest.approx(1, abs=0.01)


def test_the_model_has_one_layer_and_the_words_of_another_one(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = make_model(tmp_path / "model", str(bundled()))
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.num_hidden_layers, config.vocab_size) == (1, len(tokenizer))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 50e6
