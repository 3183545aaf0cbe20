"""Two models behind one endpoint, each in vLLM, and a third one that vLLM cannot start."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import SMALL, START_TIMEOUT_S, started, wait_for
from tests.serving.test_swap import raylign
from tests.serving.test_swap_of_whole_weights import answered_logprobs, greedy_logprobs, other_weights

CACHE_GIB = 0.0003
"""Room for 300 tokens of the tiny model in fp32."""

pytestmark = pytest.mark.slow


def test_each_model_answers_with_its_own_weights_and_one_that_does_not_start_with_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = other_weights(tiny_model, tmp_path / "other")
    models = (
        f"models={{other: {{checkpoint: {other.folder}}}, broken: {{checkpoint: {tiny_model}, "
        f"kv_cache_gib: {CACHE_GIB}}}}}"
    )
    settings = (f"name={SMALL}", "dtype=fp32", "max_model_len=512", "kv_cache_gib=0.1", "limits.max_tokens=8", models)
    with started(tiny_model, tmp_path, *settings) as endpoint:
        for name in (SMALL, "other"):
            wait_for(endpoint.process, f"{endpoint.url}/readyz?model={name}", endpoint.output)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ready after" not in (output := endpoint.output.read_text()):
            assert time.monotonic() < deadline, output
            time.sleep(0.5)
        print(output)
        assert "broken does not start; the endpoint goes on without it. vLLM does not start" in output
        assert f"serves {SMALL}, version 1; other, version 1" in output

        logprobs = greedy_logprobs(tiny_model)
        assert answered_logprobs(endpoint) == pytest.approx(logprobs, abs=1e-3)
        assert answered_logprobs(endpoint, "other") == pytest.approx(other.logprobs, abs=1e-3)

        promoted = raylign(endpoint, "promote", str(tiny_model), "--model", "other")
        assert promoted.returncode == 0, promoted.stdout + promoted.stderr
        assert answered_logprobs(endpoint, "other") == pytest.approx(logprobs, abs=1e-3)
        states = {
            name: endpoint.ask("GET", f"/v1/admin/versions?model={name}").json()["state"] for name in (SMALL, "other")
        }
        assert [state["current"] for state in states.values()] == [1, 2]

        # Ray Serve tries it once more, and requests wait for that; it is given up afterwards.
        deadline, body = time.monotonic() + START_TIMEOUT_S, {"model": "broken", "prompt": "Hello"}
        key, status = {"authorization": f"Bearer {endpoint.keys['user']}"}, 0
        while status != 503:
            assert time.monotonic() < deadline
            with suppress(httpx.ReadTimeout):
                status = httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=key, timeout=5).status_code
