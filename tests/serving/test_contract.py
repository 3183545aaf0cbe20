"""The endpoint against its own OpenAPI document: thousands of requests made up from it, and none that breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import Running, started

CASES_AT_LEAST = 2000
EXAMPLES = 110
"""Requests that are made up for each operation, beside those that the bounds in the document ask for."""


@pytest.mark.timeout(900)
def test_no_request_that_the_document_allows_or_forbids_breaks_the_service(tiny_model: Path, tmp_path: Path) -> None:
    settings = (
        "name=tiny",
        "kv_cache_gib=0.1",
        "limits.max_tokens=4",
        "limits.max_n=2",
        "feedback.record=true",
        f"rewards.reference={tiny_model}",
        "rewards.min_replicas=1",
        "rewards.max_length=128",
    )
    with started(tiny_model, tmp_path, *settings) as endpoint:
        document = tmp_path / "openapi.json"
        document.write_text(endpoint.ask("GET", "/openapi.json").text)
        assert cases_tried(endpoint, document) >= CASES_AT_LEAST
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2}
        assert endpoint.ask("POST", "/v1/chat/completions", chat).status_code == 200


def cases_tried(endpoint: Running, document: Path) -> int:
    """Has schemathesis ask with an admin's key, so that every route is reached; fails at any status of 500 and more."""
    report = document.parent / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", endpoint.url),
        *("--header", f"Authorization: Bearer {endpoint.keys['admin']}"),
        *("--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"),
        # One worker, since Python 3.11 before 3.11.8 cannot parse source in several threads at once (its gh-106905).
        *("--max-examples", str(EXAMPLES), "--workers", "1", "--seed", "1", "--generation-database", "none"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--continue-on-failure"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=document.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(json.loads(report.read_text())["test_cases"]["generated"])
