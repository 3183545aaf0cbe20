"""The endpoint against its own OpenAPI document: requests made up from it, the same each time, and none breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import SMALL, Running


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("phases", "examples", "cases_at_least"),
    [
        pytest.param("examples,fuzzing", 12, 100, id="a few"),
        pytest.param("examples,coverage,fuzzing", 110, 2000, id="thousands", marks=pytest.mark.slow),
    ],
)
def test_no_request_that_the_document_allows_or_forbids_breaks_the_service(
    small_endpoint: Running, tmp_path: Path, phases: str, examples: int, cases_at_least: int
) -> None:
    document = tmp_path / "openapi.json"
    document.write_text(small_endpoint.ask("GET", "/openapi.json").text)
    assert cases_tried(small_endpoint, document, phases, examples) >= cases_at_least
    chat = {"model": SMALL, "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2}
    assert small_endpoint.ask("POST", "/v1/chat/completions", chat).status_code == 200


def cases_tried(endpoint: Running, document: Path, phases: str, examples: int) -> int:
    """Has schemathesis ask with an admin's key, so that every route is reached.

    It fails at any status of 500 and more, and at an answer that differs from what the document says of it.

    Args:
        phases: which requests: `examples` of the document, `coverage` of its bounds, `fuzzing` at random.
        examples: requests that are made up for each operation, beside those that the bounds in the document ask for.
    """
    report = document.parent / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", endpoint.url),
        *("--header", f"Authorization: Bearer {endpoint.keys['admin']}"),
        *("--checks", "not_a_server_error,response_schema_conformance", "--phases", phases),
        # One worker, since Python 3.11 before 3.11.8 cannot parse source in several threads at once (its gh-106905).
        *("--max-examples", str(examples), "--workers", "1", "--seed", "1", "--generation-database", "none"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--continue-on-failure"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=document.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(json.loads(report.read_text())["test_cases"]["generated"])
