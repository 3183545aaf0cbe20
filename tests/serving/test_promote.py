"""`raylign promote`, `rollback` and `versions`: what is switched, what is refused, and what is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from alignment.errors import ConfigError, ServingError
from serving.registry.client import EndpointClient, Listing
from serving.registry.promote import delete_versions, list_versions, promote, rollback, versions
from serving.registry.state import State
from serving.registry.versions import Registry
from serving.replica.engine import Status
from tests.commands import raylign_here
from tests.conftest import free_port
from tests.serving.standin import Standin, broken, running
from tests.serving.tiny import adapter, of_run

ROOT = Path(__file__).parents[2]
PATIENCE_S = 250.0
"""Beside a training run, a process of two seconds may take minutes."""
RIGHT, WRONG = "It is 4.", "It is 5."


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Standin]:
    """An endpoint that answers with version 1, and would answer with a version 2 as well."""
    registry = Registry(tmp_path / "registry")
    registry.add(adapter(tmp_path / "first"))
    registry.promote(1)
    with running(registry) as standin:
        standin.says = {1: lambda prompt: RIGHT, 2: lambda prompt: RIGHT, 3: lambda prompt: RIGHT}
        standin.prefers = dict.fromkeys((1, 2, 3), lambda text: 3.0 if text == RIGHT else 1.0)
        yield standin


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The folder of a run that became better."""
    of_run(tmp_path / "better", 5, seed=5)
    (tmp_path / "better" / "metrics.jsonl").write_text('{"step": 5, "eval/rewards/accuracies": 0.875, "eval/kl": 3}\n')
    return str(tmp_path / "better")


@pytest.fixture
def gate(tmp_path: Path, write_rows: Any) -> Path:
    rows = [{"prompt": "2 + 2?", "chosen": RIGHT, "rejected": WRONG, "keywords": ["4"]}] * 4
    data = {"path": str(write_rows(rows)), "keep": ["keywords"], "prompt_as": "user_message"}
    file = tmp_path / "gate.yaml"
    file.write_text(yaml.safe_dump({"data": data, "eval_rewards": [{"name": "keywords"}], "margins": {"max_kl": 30}}))
    return file


def raylign(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)


def test_a_run_is_promoted_and_taken_back(service: Standin, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    promote(run, url=service.url)
    assert service.registry.state() == State(current=2, previous=1, serial=2)
    assert service.registry.version(2).parent == 1
    assert "Version 2 answers, in place of version 1; `raylign rollback` undoes it." in capsys.readouterr().out
    rollback(url=service.url)
    assert service.registry.state().current == 1
    assert "Version 1 answers again, in place of version 2." in capsys.readouterr().out
    with pytest.raises(ServingError, match=r"refuses POST /v1/admin/rollback: nothing answered before version 1"):
        rollback(url=service.url)


def test_a_known_version_is_promoted_by_its_number(service: Standin, run: str) -> None:
    promote(run, url=service.url)
    rollback(url=service.url)
    promote("2", url=service.url)
    assert service.registry.state().current == 2
    with pytest.raises(ServingError, match="has no version 7; it has 1, 2"):
        promote("7", url=service.url)


def test_a_relative_path_is_told_in_full(service: Standin, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(run).parent)
    promote("better", url=service.url)
    assert service.registry.version(2).source.startswith(run)


def test_what_answers_already_is_left_alone(
    service: Standin, tmp_path: Path, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(str(tmp_path / "first"), url=service.url, gate=gate)
    assert service.registry.state().serial == 1
    assert service.asked == []
    assert "version 1 (first) answers already." in capsys.readouterr().out


def test_a_canary_gets_a_share_and_then_everything_or_nothing(
    service: Standin, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(run, url=service.url, canary=0.1)
    assert service.registry.state() == State(current=1, canary=2, share=0.1, serial=2)
    assert "answers 0.1 of the requests" in capsys.readouterr().out
    rollback(url=service.url)
    assert "Version 2 is no canary any more; version 1 answers everything." in capsys.readouterr().out
    promote("2", url=service.url, canary=0.2)
    promote("2", url=service.url)
    assert service.registry.state() == State(current=2, previous=1, serial=5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0])
def test_a_share_that_is_none_is_refused_before_anything_is_asked(service: Standin, run: str, share: float) -> None:
    with pytest.raises(ServingError, match="above 0 to below 1"):
        promote(run, url=service.url, canary=share)
    assert len(service.registry.versions()) == 1


def test_a_dry_run_registers_and_switches_nothing(
    service: Standin, run: str, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(run, url=service.url, gate=gate, dry_run=True)
    state = service.registry.state()
    assert (state.current, state.canary, len(service.registry.versions())) == (1, None, 2)
    assert "may be promoted. Nothing was switched." in capsys.readouterr().out


def test_a_candidate_that_does_not_fit_is_refused_in_the_endpoint_s_words(service: Standin, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"refuses POST /v1/admin/versions: .*rank 64.*\(HTTP status 409\)"):
        promote(str(adapter(tmp_path / "large", rank=64)), url=service.url)
    with pytest.raises(ServingError, match="nowhere is not a folder here"):
        promote("nowhere", url=service.url)
    assert service.registry.state().serial == 1


def test_a_candidate_that_passes_the_gate_is_promoted(
    service: Standin, run: str, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(run, url=service.url, gate=gate)
    assert service.registry.state().current == 2
    printed = capsys.readouterr().out
    assert "version 1  version 2  allowed" in printed
    assert "accuracy               1          1          ≥ 0.98   ok" in printed


def test_a_candidate_that_passes_the_gate_may_start_as_a_canary(service: Standin, run: str, gate: Path) -> None:
    promote(run, url=service.url, gate=gate, canary=0.3)
    state = service.registry.state()
    assert (state.current, state.canary, state.share) == (1, 2, 0.3)


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_worse_candidate_is_not_promoted_and_is_no_canary_any_more(
    service: Standin, run: str, gate: Path, capsys: pytest.CaptureFixture[str], share: float | None
) -> None:
    if share:
        promote(run, url=service.url, canary=share)
    service.says[2] = lambda prompt: WRONG
    with pytest.raises(typer.Exit) as stopped:
        promote(run, url=service.url, gate=gate)
    assert stopped.value.exit_code == 1
    state = service.registry.state()
    assert (state.current, state.canary, state.share) == (1, None, 0.0)
    printed = capsys.readouterr().out
    assert "reward                 1          0          ≥ 0.95   WORSE" in printed
    assert "version 2 (better-step-00000005) is worse than allowed, and was not promoted." in printed


@pytest.mark.parametrize("share", [None, 0.5])
def test_an_examination_that_fails_leaves_the_endpoint_as_it_was(
    service: Standin, run: str, gate: Path, share: float | None
) -> None:
    if share:
        promote(run, url=service.url, canary=share)
    service.says[2] = broken
    with pytest.raises(ServingError, match="HTTP status 500"):
        promote(run, url=service.url, gate=gate)
    state = service.registry.state()
    assert (state.current, state.canary, state.share) == (1, share and 2, share or 0.0)


def test_a_comparison_with_a_version_that_is_gone_meanwhile_is_void(
    service: Standin, run: str, gate: Path, tmp_path: Path
) -> None:
    service.registry.add(adapter(tmp_path / "other", seed=8))
    service.on_asked = lambda: service.registry.promote(2)
    service.says[3] = lambda prompt: RIGHT
    with pytest.raises(ServingError, match=r"Version 3 is not loaded|version 2 answers, and the canary is None"):
        promote(run, url=service.url, gate=gate)
    assert service.registry.state().current == 2


def test_another_canary_is_not_disturbed_by_a_gate(service: Standin, run: str, gate: Path, tmp_path: Path) -> None:
    promote(str(adapter(tmp_path / "other", seed=8)), url=service.url, canary=0.1)
    with pytest.raises(ServingError, match="version 2 is being tried already"):
        promote(run, url=service.url, gate=gate)
    assert service.registry.state().share == 0.1


def test_the_list_shows_what_answers_and_what_is_known(
    service: Standin, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(run, url=service.url)
    promote(str(adapter(tmp_path / "other", seed=8)), url=service.url, canary=0.25)
    capsys.readouterr()
    list_versions(url=service.url)
    header, first, second, third, held = capsys.readouterr().out.splitlines()
    assert held == "No replica says what it holds."
    assert header.split() == ["version", "kind", "created", "source", "held", "out"]
    today = time.strftime("%Y-%m-%d")
    assert first.split()[:4] == ["1", "previous", "adapter", today]
    assert second.split()[:4] == ["2", "current", "adapter", today]
    assert second.endswith("checkpoints/step-00000005  accuracy 0.875, kl 3")
    assert third.split()[:4] == ["3", "canary", "0.25", "adapter"]


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        ({"version": 0}, "starts."),
        ({"version": 3}, "holds version 3."),
        ({"version": 0, "failed": 3, "error": "no memory"}, "cannot load version 3: no memory"),
    ],
)
def test_the_list_shows_what_replicas_hold_and_what_has_become_of_the_candidate(
    service: Standin, capsys: pytest.CaptureFixture[str], candidate: dict[str, Any], told: str
) -> None:
    service.replicas = [asdict(Status(replica="abc", version=1, loaded=(1,), asked=7))]
    service.candidate = {"replica": "xyz", **candidate}
    list_versions(url=service.url)
    held = capsys.readouterr().out.splitlines()[-2:]
    assert held == ["Replica abc holds version 1.", f"The candidate's replica xyz {told}"]


def test_the_key_comes_from_the_environment(
    service: Standin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service.key = "rk_1_secret"
    monkeypatch.delenv("RAYLIGN_KEY", raising=False)
    with pytest.raises(ServingError, match=r"This needs a key\. .*401; RAYLIGN_KEY has to hold an admin's key"):
        list_versions(url=service.url)
    monkeypatch.setenv("RAYLIGN_KEY", "rk_1_secret")
    list_versions(url=service.url)
    monkeypatch.setenv("RAYLIGN_KEY", "not a\nkey")
    with pytest.raises(ConfigError, match="RAYLIGN_KEY must hold a key"):
        list_versions(url=service.url)


def test_an_endpoint_that_is_not_there_is_told_so() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServingError, match=f"{url} cannot be reached"):
        list_versions(url=url)
    for wrong in ("127.0.0.1:8000", "http://[", ""):
        with pytest.raises(ServingError, match="cannot be reached"):
            list_versions(url=wrong)


def test_something_else_at_the_url_is_told_so(service: Standin) -> None:
    with pytest.raises(ServingError, match=r"refuses GET /v1/admin/versions: Not Found \(HTTP status 404\)"):
        list_versions(url=f"{service.url}/v1/models")
    with (
        EndpointClient(service.url, timeout_s=10) as asked,
        pytest.raises(ServingError, match="in a form that is not raylign's: 2 problems, as at versions"),
    ):
        asked.get("/v1/models", Listing)


def test_the_commands_say_no_by_their_exit_status(service: Standin, run: str, gate: Path) -> None:
    service.says[2] = lambda prompt: WRONG
    refused = raylign("promote", run, "--url", service.url, "--gate", str(gate))
    assert refused.returncode == 1
    assert "WORSE" in refused.stdout
    assert refused.stderr == ""
    failed = raylign_here("rollback", "--url", service.url)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"ServingError: {service.url} refuses POST /v1/admin/rollback: nothing answered before")


def test_an_interrupted_examination_ends_the_trial(service: Standin, run: str, gate: Path) -> None:
    service.on_asked = lambda: time.sleep(0.5)
    command = ["promote", run, "--url", service.url, "--gate", str(gate)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not service.at_once and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.registry.state().canary == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) != 0
    assert service.registry.state().canary is None


def test_versions_are_deleted_by_number_and_needed_ones_are_not(
    service: Standin, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(run, url=service.url)
    with pytest.raises(ServingError, match=r"version 1 cannot be deleted: `raylign rollback` returns to it"):
        delete_versions([1], url=service.url)
    rollback(url=service.url)
    done = raylign_here("versions", "delete", "2", "--url", service.url)
    assert done.returncode == 0 and "Version 2 is deleted; 0.0" in done.stdout, done.stderr
    listed = raylign_here("versions", "--url", service.url)
    assert listed.returncode == 0 and "current" in listed.stdout and "better" not in listed.stdout, listed.stderr
    with pytest.raises(ServingError, match="versions delete 3 4"):
        versions(["delete"], url=service.url)


def test_what_is_under_way_is_told(service: Standin, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    promote(run, url=service.url)
    service.registry.begin_rollback(started_by="Anna")
    list_versions(url=service.url)
    assert "The rollback to version 1, which Anna asked for, is under way since 20" in capsys.readouterr().out
    with pytest.raises(ServingError, match=r"rollback to version 1, which Anna asked for, is under way .* try again"):
        promote("1", url=service.url)
