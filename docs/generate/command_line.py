"""The page of what `--help` says, of every command."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import typer

from cluster.cli import COMMANDS, USAGE
from docs.generate.text import NOTICE, code_block, page_text

WIDTH = 100
"""Columns of the terminal that `--help` writes for."""


def command_line_page() -> str:
    """What `--help` says, of every command."""
    blocks = ["# Command line", NOTICE, code_block(USAGE.format(commands="\n".join(_summaries())))]
    for name in COMMANDS:
        blocks += [f"## `raylign {name}`", *_helps(name)]
    return page_text(blocks)


def _summaries() -> Iterator[str]:
    return (f"  {name:13} {summary}" for name, (_, summary) in COMMANDS.items())


def _helps(name: str) -> Iterator[str]:
    location, summary = COMMANDS[name]
    module, _, attribute = location.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    app = typer.Typer(help=summary, add_completion=False, rich_markup_mode=None)
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command()(command)
    yield from _help(typer.main.get_command(app), f"raylign {name}")


def _help(command: Any, name: str) -> Iterator[str]:
    """The text of a command, and of those below it."""
    widths = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = command.make_context(name, [], resilient_parsing=True, **widths)
    yield code_block(command.get_help(context))
    for subcommand in getattr(command, "commands", {}).values():
        yield f"### `{name} {subcommand.name}`"
        yield from _help(subcommand, f"{name} {subcommand.name}")
