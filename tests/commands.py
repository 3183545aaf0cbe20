"""`raylign` in the process of a test, where it does not matter that it is a process of its own."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys

import pytest

from cluster import cli


def raylign_here(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a process of `raylign` with these arguments and environment variables would print, and its exit status."""
    output, errors = io.StringIO(), io.StringIO()
    on_terminate = signal.getsignal(signal.SIGTERM)
    status: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", ["raylign", *arguments])
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
        if not isinstance(status, int):  # as Python ends a process
            print(status, file=sys.stderr)
            status = 1
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())
