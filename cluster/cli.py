"""The command `raylign`. Each subcommand is imported only when it is called, so that `--help` is fast."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import typer

from alignment.errors import AlignmentError
from alignment.settings.plugins import search_for_modules

# name: (module:function, description). The functions are ordinary ones, annotated for Typer; a command with commands of
# its own is a `typer.Typer`.
COMMANDS = {
    "train": ("cluster.launch:train", "train a model on preferences, as a YAML file says"),
    "pipeline": ("cluster.pipeline:pipeline", "train several models in a chain, as SFT, reward model, PPO"),
    "serve": ("serving.launch:serve", "put a trained model behind an OpenAI-compatible HTTP endpoint"),
    "bench": ("serving.bench.command:bench", "measure the endpoint under load, beside plain vLLM"),
    "promote": (
        "serving.registry.promote:promote",
        "make an endpoint answer with another checkpoint, checked and gated",
    ),
    "rollback": ("serving.registry.promote:rollback", "make an endpoint answer with the version before"),
    "versions": (
        "serving.registry.promote:versions",
        "list the versions that an endpoint has, and which of them answers",
    ),
    "reward-server": ("serving.reward_server:reward_server", "put a reward model behind HTTP, for runs to ask"),
    "keys": ("serving.feedback.keys:commands", "create, list, change and revoke the keys that an endpoint lets in"),
    "audit": ("serving.feedback.audit:audit", "list who changed, exported or deleted what at an endpoint"),
    "report": ("alignment.report:report", "write a run's curves and samples as one HTML page"),
    "schema": ("cluster.launch:schema", "print the JSON Schema of a run's YAML file, for editors"),
    "demo": ("cluster.demo:demo", "train by DPO, serve and compare the bundled model, from one command"),
    "demo-ppo": ("cluster.demo_ppo:demo_ppo", "the original RLHF, SFT, reward model and PPO, from one command"),
}

USAGE = """\
Usage: raylign COMMAND [ARGUMENTS]

From people's preferences to an aligned model behind an HTTP endpoint.

Commands:
{commands}

raylign COMMAND --help explains a command."""


def main() -> None:
    """Entry point of the console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            USAGE.format(
                commands="\n".join(f"  {name:13} {description}" for name, (_, description) in COMMANDS.items())
            )
        )
    elif name in COMMANDS:
        del sys.argv[1]
        run_command(name, f"raylign {name}")
    else:
        sys.exit(f"raylign: unknown command {name!r}; known are {', '.join(COMMANDS)}")


def run_command(name: str, program: str) -> None:
    """Runs one command with the arguments in `sys.argv`; an AlignmentError is printed without a traceback.

    Args:
        name: a key of `COMMANDS`.
        program: the name of the program in messages about usage.
    """
    search_for_modules(Path.cwd())  # as `python -m` does; the path of a console script has only its own folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # SystemExit frees engines and locks
    target, description = COMMANDS[name]
    module, _, function = target.partition(":")
    command = getattr(importlib.import_module(module), function)
    app = typer.Typer(help=description, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    if isinstance(command, typer.Typer):
        app.add_typer(command)  # without a name: its commands become those of `app`
    else:
        app.command()(command)
    try:
        app(prog_name=program)
    except AlignmentError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def call(*arguments: str) -> int:
    """Runs `raylign` in a process of its own and returns its exit status; if this process is ended, that one is too."""
    child = subprocess.Popen([sys.executable, "-m", "cluster.cli", *arguments])
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


if __name__ == "__main__":
    main()
