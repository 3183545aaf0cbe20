"""The command `raylign`: help at once, and errors for people."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from alignment.environment import NO_BARS
from cluster.cli import COMMANDS

RAYLIGN = Path(sys.executable).parent / "raylign"


def raylign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(RAYLIGN), *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


def one_line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr of a command that failed as it should."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_answers_in_under_a_second(arguments: list[str]) -> None:
    command = [str(RAYLIGN), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        # Of the processor's time, which other programs do not add to, and of this process's alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert told.startswith("Usage: raylign")
    assert usage.ru_utime + usage.ru_stime < 1


def test_help_names_every_command() -> None:
    for told in (raylign(), raylign("-h")):
        assert told.returncode == 0
        for name, (_, what) in COMMANDS.items():
            assert any(line.split(maxsplit=1) == [name, what] for line in told.stdout.splitlines())


def test_help_of_a_command_explains_its_arguments() -> None:
    told = raylign("train", "--help").stdout
    assert "CONFIG" in told and "[KEY=VALUE]..." in told
    assert "Trains a model on preferences" in told
    assert "as optim.lr=1e-6" in told


@pytest.mark.parametrize("name", ["trian", "--version", ""])
def test_an_unknown_command_is_refused_with_those_that_exist(name: str) -> None:
    expected = f"raylign: unknown command {name!r}; known are {', '.join(COMMANDS)}"
    assert one_line_of(raylign(name)) == expected


def test_an_error_of_ours_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    line = one_line_of(raylign("train", "nowhere.yaml", cwd=tmp_path))
    assert line == "ConfigError: nowhere.yaml: cannot be read: No such file or directory"
    (tmp_path / "run.yaml").write_text("name: run\nsteps: 1\nalgorithm: {name: dpo}\ndata: {path: ./none.jsonl}\n")
    line = one_line_of(raylign("train", "run.yaml", "lr=1", "optim", cwd=tmp_path))
    assert line.startswith("ConfigError: override 'optim' must have the form section.key=value")
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves nothing behind"


POLITE = "def reward(prompts, completions, **rest):\n    return [float('please' in text) for text in completions]\n"
REWARDED = (
    "name: run\nsteps: 1\nalgorithm: {name: grpo}\ndata: {path: ./none.jsonl}\nrewards: [{name: 'politeness:reward'}]\n"
)


@pytest.mark.parametrize(
    ("command", "beside"),
    [([str(RAYLIGN), "train"], "current folder"), ([sys.executable, "-m", "cluster"], "configuration")],
    ids=["script", "-m"],
)
def test_a_function_is_found_in_the_current_folder_and_beside_the_configuration(
    tmp_path: Path, command: list[str], beside: str
) -> None:
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "run.yaml"
    config.write_text(REWARDED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for is_there, told in ((False, "cannot be imported: No module named 'politeness'"), (True, "optim.lr: Input")):
        if is_there:
            folder = tmp_path if beside == "current folder" else config.parent
            (folder / "politeness.py").write_text(POLITE)
        done = subprocess.run(
            [*command, str(config), "optim.lr=0"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert told in done.stderr and ("politeness" in done.stderr) != is_there
        assert is_there or (str(tmp_path) in done.stderr and str(config.parent) in done.stderr)


@pytest.mark.parametrize("code", ["def reward(:\n", "import no_such_package\n", "reward = 1 / 0\n"])
def test_a_module_that_cannot_be_run_is_an_error_with_its_reason(tmp_path: Path, code: str) -> None:
    (tmp_path / "run.yaml").write_text(REWARDED)
    (tmp_path / "politeness.py").write_text(code)
    done = raylign("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "scorer 'politeness:reward' cannot be imported: " in done.stderr


def test_several_problems_of_a_configuration_are_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: run\nsteps: 1\nalgorithm: {name: dpo}\ndata: {path: ./none.jsonl}\n")
    told = raylign("train", "run.yaml", "optim.lr=0", "sede=1", cwd=tmp_path)
    assert told.returncode == 1
    assert told.stderr.splitlines() == [
        "ConfigError: run.yaml:",
        "optim.lr: Input should be greater than 0 (given: 0)",
        "sede: unknown key; did you mean 'seed'?",
    ]


def test_a_missing_argument_is_a_usage_error() -> None:
    told = raylign("train")
    assert told.returncode == 2
    assert "Missing argument 'CONFIG'" in told.stderr
    assert "Traceback" not in told.stderr


def test_the_schema_is_valid_json_schema_on_its_own() -> None:
    told = raylign("schema")
    assert told.returncode == 0, told.stderr
    schema = json.loads(told.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {"name", "algorithm", "data", "cluster"} <= schema["properties"].keys()


def test_python_m_cluster_is_the_same_train_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster", "nowhere.yaml"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert one_line_of(told) == "ConfigError: nowhere.yaml: cannot be read: No such file or directory"


def test_a_file_gets_our_own_lines_and_nothing_else(run_settings: dict[str, Any], tmp_path: Path) -> None:
    """No progress bars of libraries, and no warnings about a machine that is as it is."""
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump({**run_settings, "steps": 1}), encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if name not in (*NO_BARS, "DS_ACCELERATOR")}
    with (tmp_path / "output").open("w") as file:
        subprocess.run([RAYLIGN, "train", str(recipe)], stdout=file, stderr=subprocess.STDOUT, check=True, env=plain)
    lines = (tmp_path / "output").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["data:", "starting", "step", "step", "done."]
