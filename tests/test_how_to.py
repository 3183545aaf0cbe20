"""The pages of `docs/how-to` do what they say: their files are written into a scratch folder, and their commands run.

A page's files are the fenced blocks behind a line with the file's name, as "`run.yaml`:". Blocks marked `sh` hold
commands, blocks marked `text` what these print, where … stands for anything. A tiny random model takes the place of the
bundled one; nothing else of a page is changed.
"""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from alignment.run_folder import RunFolder
from alignment.settings.plugins import MODULE_FOLDERS
from cluster import cli
from tests.alignment.test_train import run

FOLDER = Path(__file__).parents[1] / "docs" / "how-to"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))
FENCE = re.compile(r"^(?:`(?P<file>[\w./-]+)`:\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MAX_CODE_LINES = 40
MAX_LINE_LENGTH = 150


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    file: str | None
    kind: str
    text: str


def blocks_of(page: str) -> list[Block]:
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    return [Block(match["file"], match["kind"], match["text"]) for match in FENCE.finditer(text)]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, from which nothing is left in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    known_modules, known_folders = set(sys.modules), list(MODULE_FOLDERS)
    on_terminate = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, on_terminate)
    MODULE_FOLDERS[:] = known_folders
    for name in set(sys.modules) - known_modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(page: str, scratch: Path) -> None:
    """Writes a page's files."""
    for block in blocks_of(page):
        if block.file is not None:
            (scratch / block.file).parent.mkdir(parents=True, exist_ok=True)
            (scratch / block.file).write_text(block.text, encoding="utf-8")


def run_page(page: str, scratch: Path, model: Path) -> None:
    """Writes a page's files and runs its commands, in this process, which has loaded torch already."""
    write_files(page, scratch)
    for block in blocks_of(page):
        if block.kind == "sh":
            for command in block.text.splitlines():
                run_command([word.replace("MODEL", str(model)) for word in shlex.split(command)], model)


def run_command(words: list[str], model: Path) -> None:
    program, *arguments = words
    if program == "python":
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    elif program == "raylign" and arguments[0] == "train":
        sys.argv[:] = ["raylign", *arguments, f"model.path={model}", "model.dtype=fp32"]
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main()
    else:
        raise AssertionError(f"how is {' '.join(words)!r} run here?")


def assert_printed(page: str, output: str) -> None:
    for block in blocks_of(page):
        for line in block.text.splitlines() if block.kind == "text" else []:
            assert re.search(re.escape(line).replace("…", ".+"), output), f"{line!r} is not in:\n{output}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_little_code_and_no_long_lines(page: str) -> None:
    lines = (FOLDER / f"{page}.md").read_text(encoding="utf-8").splitlines()
    code = [line for block in blocks_of(page) if block.kind == "python" for line in block.text.splitlines()]
    assert len(code) < MAX_CODE_LINES
    assert max(map(len, lines)) <= MAX_LINE_LENGTH


TRAINED_PAGES = ["algorithm", "attention", "data-shape", "loss", "optimizer", "reward", "source", "storage", "tracker"]


@pytest.mark.parametrize("page", TRAINED_PAGES)
def test_what_a_page_adds_is_trained_with(
    page: str, scratch: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_page(page, scratch, tiny_model)
    assert_printed(page, capfd.readouterr().out)
    for folder in (scratch / "runs").iterdir():
        assert [line["step"] for line in RunFolder(folder).read_metrics()] == [1, 2]


def test_a_refused_family_says_with_which_attention_it_works(
    scratch: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.alignment.families import write_family

    run_page("model-family", scratch, write_family(tmp_path_factory.mktemp("doge"), "doge"))
    output = capfd.readouterr().out
    assert_printed("model-family", output)
    assert output.splitlines()[-1] == "sdpa: can be trained"


@pytest.fixture
def brief_model(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained to answer with one digit: as it is, it never ends an answer."""
    chats = [
        [{"role": "user", "content": "Guess my number."}, {"role": "assistant", "content": f"{number}"}]
        for number in range(1, 9)
    ]
    rows = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return run(
        {**run_settings, "output": str(rows.parent), "steps": 20, "groups_per_step": 8},
        algorithm={"name": "sft"},
        data={"path": str(rows), "max_length": 64},
        optim={"lr": 1e-2, "schedule": "constant"},
    )


def test_a_game_is_played_for_several_turns(
    scratch: Path, brief_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_page("environment", scratch, brief_model)
    assert_printed("environment", capfd.readouterr().out)
    steps = RunFolder(scratch / "runs" / "game").read_metrics()
    assert [step["step"] for step in steps] == [1, 2]
    assert any(step["reward"] != 0 for step in steps), "some guesses were right or wrong"


def test_a_route_is_served_once_its_file_is_there(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.config import LimitsConfig, ServeConfig
    from serving.feedback.keys import Key
    from serving.http import routes
    from serving.http.access import AccessMiddleware
    from serving.http.ingress import application
    from serving.registry.models import ServedModels
    from serving.registry.served_model import ServedModel
    from serving.registry.state import State

    write_files("route", scratch)
    monkeypatch.setattr(routes, "__path__", [*routes.__path__, str(scratch / "serving" / "http" / "routes")])
    state = State(current=3)
    served = ServedModel(name="model", source="/model", base_name=None, adapter=None, lora_capacity=None)
    model: Any = SimpleNamespace(id="model", served_model=served, registry=SimpleNamespace(state=lambda: state))
    context: Any = SimpleNamespace(config=ServeConfig(checkpoint="model"), models=ServedModels([model]), started_at=0)
    key = Key(name="anna", role="user")
    app = AccessMiddleware(
        application(context, lambda: asyncio.sleep(0, b"")),
        authenticate=lambda headers: key if headers else None,
        is_public=lambda path: False,
        limits=LimitsConfig(answers_in_progress=1),
        local_only=False,
    )

    async def ask(headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.get("/v1/uptime", headers=headers)

    answer = asyncio.run(ask({"Authorization": "Bearer KEY"}))
    assert answer.status_code == 200 and answer.json()["version"] == 3
    assert asyncio.run(ask({})).status_code == 401


def test_every_page_is_run_by_a_test() -> None:
    assert set(PAGES) == {*TRAINED_PAGES, "environment", "model-family", "route"}
