"""docs/operations.md says what can be typed: its commands, files and Secrets are there."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from cluster.cli import COMMANDS
from cluster.config import load_run
from serving.config import load_serve_config
from serving.feedback.keys import create_key
from serving.feedback.store import Store
from tests.cluster.reach import needs_of, pods_of
from tests.cluster.test_cluster_files import KUBERNETES_FILES, load
from tests.databases import new_database

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
HEADS = [path.read_text() for path in sorted((ROOT / "configs" / "cluster").iterdir())]
BLOCKS = [re.sub(r"\\\n\s*", "", block) for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```\n.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL))
LINES = [re.sub(r" {3,}#.*", "", line) for block in BLOCKS for line in block.splitlines()] + INLINE
ALTERNATIVES = [
    " ".join(line.lstrip("# ") for line in commented.splitlines())
    for commented in re.findall(r"(?<=entrypoint: >-\n)(?:#     .+\n)+", "".join(HEADS))
]
"""Entrypoints that a file has as comments."""


START = rf"(?:^|\s|')(raylign (?:{'|'.join(COMMANDS)})(?=\s|$)|python -m cluster(?= ))"


def ours() -> list[list[str]]:
    """The words of each `raylign …` and `python -m cluster …`, wherever it stands in a line."""
    found = []
    for line in LINES + ALTERNATIVES:
        for start in re.finditer(START, line):
            text = line[start.start(1) :].removesuffix("'").partition(" …")[0]
            words = shlex.split(text)
            found.append(words[1:] if words[0] == "raylign" else ["train", *words[3:]])
    names_only = [[name] for name in COMMANDS if name in ("serve", "train")]  # in a sentence, not to be typed
    return [words for words in found if words not in names_only]


@pytest.mark.parametrize("words", ours(), ids=" ".join)
def test_a_command_of_ours_has_these_arguments_and_settings(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = parsed(words)
    settings = [setting for setting in given.get("overrides") or []]
    if words[0] == "train":
        config = str(given["config"]).removeprefix("/home/ray/raylign/")
        load_run(Path(config), settings)
    if words[0] == "serve":
        load_serve_config(given["checkpoint"], settings, given["config"])


def parsed(words: list[str]) -> dict[str, Any]:
    """What click makes of a command's words, without running it."""
    module, _, function = COMMANDS[words[0]][0].partition(":")
    target = getattr(importlib.import_module(module), function)
    app = typer.Typer(add_completion=False)
    if isinstance(target, typer.Typer):
        app.add_typer(target)
    else:
        app.command()(target)
    command: click.Command = typer.main.get_command(app)
    rest = words[1:]
    if isinstance(command, click.Group):
        name, inner, rest = command.resolve_command(click.Context(command), rest)
        assert name is not None and inner is not None
        command = inner
    return command.make_context(words[0], list(rest)).params


def test_the_page_names_commands_of_every_kind() -> None:
    assert {words[0] for words in ours()} >= {"train", "serve", "promote", "rollback", "versions", "keys"}


def test_every_file_that_is_applied_is_there_and_every_file_is_named() -> None:
    text = " ".join(LINES)
    named = set(re.findall(r"configs/[\w/]+\.(?:yaml|txt)|configs/cluster/Dockerfile", text))
    assert [path for path in named if not (ROOT / path).is_file()] == []
    assert {name for name in KUBERNETES_FILES if name not in PAGE} == set()


def test_every_secret_that_a_pod_needs_is_made() -> None:
    made = {
        (name, key)
        for text in (PAGE, *HEADS)
        for name, key in re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", text)
    }
    needed = set()
    for name in KUBERNETES_FILES:
        for document in load(name):
            variables = [variable for pod in pods_of(document) for variable in pod.variables.values()]
            references = [variable.get("valueFrom", {}).get("secretKeyRef") for variable in variables]
            if document["kind"] == "RayService":
                options = document["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
                references.append(options["redisPassword"]["valueFrom"]["secretKeyRef"])
            needed |= {(reference["name"], reference["key"]) for reference in references if reference}
    assert needed - made == set()
    assert {("raylign-database", "password"), ("raylign-keys", "admin")} <= needed


def test_the_address_for_jobs_is_that_of_the_endpoints_service() -> None:
    (job,) = load("promote.yaml")
    ((need,),) = needs_of(job).values()
    assert f"http://{need.host}:{need.port}" in PAGE


def test_a_dump_brings_back_keys(postgresql: str, tmp_path: Path) -> None:
    """The commands of the page, but for the pod that they run in and the name of the database."""
    url = new_database(postgresql)
    store = Store(url)
    create_key(store, name="anna", role="labeller")
    kept = store.keys()
    plain = url.replace("+psycopg", "")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    dump, restore = (
        re.findall(rf"-- ({program} .+?)(?: [<>] \S+)$", PAGE, re.MULTILINE)[0] for program in ("pg_dump", "pg_restore")
    )
    dumped = subprocess.run(
        [programs / "pg_dump", *_without_name(dump), f"--dbname={plain}"], check=True, capture_output=True
    ).stdout
    create_key(store, name="bert", role="user")
    store.close()
    subprocess.run([programs / "pg_restore", *_without_name(restore), f"--dbname={plain}"], input=dumped, check=True)
    again = Store(url)
    assert again.keys() == kept
    again.close()


def _without_name(command: str) -> list[str]:
    """The options of a command, without those that say where the database is."""
    words = shlex.split(command)[1:]
    return [word for word in words if word.startswith("--") and not word.startswith(("--username", "--dbname"))]
