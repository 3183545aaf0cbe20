"""The rule for answers that are mathematics: formulas, sets, intervals, matrices, compared by what they are worth.

It asks Hugging Face's library for it, math-verify, in processes of its own: their time and memory are bounded, since
whoever computes with what a policy writes computes 10^{10^{10}} one day. (The library's own limit is a signal, which
only a process's main thread can have.)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import queue
import re
import select
import subprocess
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import ConfigError, RewardError
from alignment.rewards import BuildableScorer, Reward, UnreadableTexts
from alignment.rewards.numbers import marked_text
from alignment.rewards.quantities import LONGEST, formula, only_number
from alignment.rewards.rules import kept_column
from alignment.settings.section import Positive, PositiveCount

if TYPE_CHECKING:
    import torch

    from alignment.groups import Completion, Group

START_S = 120.0
"""Seconds that a process may take to begin, on a machine where others compute."""
GRACE_S = 1.0
SIGNS = {"π": "\\pi ", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge "}
SIGNS |= {"±": "\\pm ", "°": "^\\circ ", "∪": "\\cup ", "∩": "\\cap ", "–": "-", "−": "-", "—": "-"}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


class Math(BuildableScorer):
    """1 for an answer that is mathematically equal to the row's, else 0, by the library math-verify.

    The answer stands after the last `####`, in the last `\\boxed{}`, or is found near the end of the text. LaTeX and
    plain formulas, fractions, roots, percentages, sets, intervals, equations and matrices are understood.
    """

    name: Literal["math"] = "math"
    """A formula that must equal the right one, as in MATH."""
    column: str = "answer"
    """Column with the right answer: a number, a formula, or a text with one in `\\boxed{}`, `$…$` or after `####`;
    `data.keep` must name it."""
    marked: bool = False
    """Count only answers after `####` or in `\\boxed{}`."""
    timeout_s: Positive = 3.0
    """Seconds after which an answer counts as one that cannot be read."""
    processes: PositiveCount = 2
    """Processes of each training worker that compare answers."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check_row(self, columns: Mapping[str, Any]) -> None:
        if (value := columns.get(self.column)) is None:
            return
        right = self.right(value)
        if not (only_number(right) or self.verifier().is_readable(_latex(right))):
            raise RewardError(self.unread(right))

    def right(self, value: Any) -> str:
        """The right answer in a column.

        Raises:
            RewardError: it holds none.
        """
        if not isinstance(value, str | Real | Decimal) or isinstance(value, bool):
            raise RewardError(
                f"column {self.column!r} holds no formula but a {type(value).__name__}: {value!r:.50}. A part of a "
                f"mapping is kept by its dotted name, as {self.column}.NAME"
            )
        text = marked_text(str(value)) or str(value)
        if not text.strip() or len(text) > LONGEST:
            raise RewardError(f"column {self.column!r} holds no formula of at most {LONGEST} characters: {value!r:.50}")
        return text

    def unread(self, right: str) -> str:
        """What is said about a right answer that cannot be read."""
        return f"column {self.column!r} holds no formula that can be read: {right!r:.50}"

    def verifier(self) -> Verifier:
        """The processes that compare, the same at every call.

        Raises:
            ConfigError: the library is not installed.
        """
        return verifier(self.processes, self.timeout_s)

    def build(self, device: torch.device) -> MathScorer:
        return MathScorer(self)


class MathScorer:
    """Compares answers, in processes beside this one."""

    def __init__(self, config: Math) -> None:
        """Starts no process yet.

        Raises:
            ConfigError: the library is not installed.
        """
        self.config = config
        self.unreadable = UnreadableTexts(config)
        self.verifier = config.verifier()

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """As the port says."""
        tasks = [[self._task(completion, group) for completion in group.completions] for group in groups]
        pairs = {task for of_group in tasks for task in of_group if isinstance(task, Pair)}
        verdicts = self.verifier.verdicts(pairs)
        return [
            [self._reward(group, task, verdicts) if isinstance(task, Pair) else task for task in of_group]
            for group, of_group in zip(groups, tasks, strict=True)
        ]

    def close(self) -> None:
        """Ends the processes."""
        self.verifier.close()

    def _task(self, completion: Completion, group: Group) -> Pair | Reward:
        """What is to be compared, or the reward where nothing is."""
        value = kept_column(group, self.config.column)
        if value is None:
            return None
        try:
            right = self.config.right(value)
        except RewardError as error:
            raise RewardError(f"group {group.id}: {error}") from error
        answer = marked_text(completion.text)
        if answer is None:
            text = completion.text[-LONGEST:]
            return Pair(right=_latex(right), answer=_signs(text)) if text.strip() and not self.config.marked else 0.0
        if not answer.strip() or len(answer) > LONGEST:
            return 0.0
        if _is_same(right, answer):
            return 1.0
        return Pair(right=_latex(right), answer=f"\\boxed{{{_latex(answer)}}}")

    def _reward(self, group: Group, pair: Pair, verdicts: Mapping[Pair, Verdict | None]) -> float:
        verdict = verdicts[pair]
        if verdict is None:
            return self.unreadable.reward(
                f"group {group.id}: an answer was not compared after {self.config.timeout_s:g} s, or took all memory"
            )
        if not verdict.is_readable:
            raise RewardError(f"group {group.id}: {self.config.unread(pair.right)}")
        return float(verdict.is_equal)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is compared."""

    right: str
    answer: str | None
    """None only tries to read the right answer."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a comparison."""

    is_readable: bool
    """Whether the right answer can be read."""
    is_equal: bool


class Verifier:
    """Processes that compare answers; one that takes too long is killed, and another takes its place."""

    def __init__(self, processes: int, timeout_s: float) -> None:
        """Starts none yet.

        Raises:
            ConfigError: the library is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("the rule math needs the package math-verify: pip install 'math-verify==0.9.0'")
        self.timeout_s = timeout_s
        self.num_processes = processes
        self._readable: dict[str, bool] = {}
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def is_readable(self, right: str) -> bool:
        """True if a right answer can be read, and compared with itself, in time."""
        if right not in self._readable:
            verdict = self._compare(Pair(right=right, answer=None))
            self._readable[right] = verdict is not None and verdict.is_readable and verdict.is_equal
        return self._readable[right]

    def verdicts(self, pairs: Collection[Pair]) -> dict[Pair, Verdict | None]:
        """What came of every pair; None of one that took too long or too much memory."""
        with ThreadPoolExecutor(self.num_processes) as threads:
            return dict(zip(pairs, threads.map(self._compare, pairs), strict=True))

    def close(self) -> None:
        """Ends the processes; a later comparison starts others."""
        for _ in range(self.num_processes):
            process = self._idle.get()
            if process is not None:
                process.end()
            self._idle.put(None)

    def _compare(self, pair: Pair) -> Verdict | None:
        process = self._idle.get()
        try:
            if process is None or not process.is_alive:
                process = _Process(self.timeout_s)
            verdict = process.compare(pair)
            if verdict is None:
                process.end()
            return verdict
        finally:
            self._idle.put(process)


class _Process:
    """One process that compares."""

    def __init__(self, timeout_s: float) -> None:
        """Starts it and waits until it is ready.

        Raises:
            RewardError: it does not begin.
        """
        self.timeout_s = timeout_s
        # -P: this folder has a module `numbers`, which would stand before that of Python.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(timeout_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._line(START_S) != b"ready\n":
            self.end()
            raise RewardError(f"the process that compares answers did not start; see {' '.join(command)}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def compare(self, pair: Pair) -> Verdict | None:
        """What came of a pair; None if it took too long or too much memory, and the process with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([pair.right, pair.answer]).encode() + b"\n")
            self._process.stdin.flush()
        line = self._line(self.timeout_s + GRACE_S)
        if not line:
            return None
        is_readable, is_equal = json.loads(line)
        return Verdict(is_readable=is_readable, is_equal=is_equal)

    def end(self) -> None:
        """Kills it, and frees what it held."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        return self._process.stdout.readline() if ready else b""


@functools.cache
def verifier(processes: int, timeout_s: float) -> Verifier:
    """The processes of a configuration, which reading rows and rating answers share."""
    return Verifier(processes, timeout_s)


def _is_same(right: str, answer: str) -> bool:
    """True if nobody needs to be asked: one number, one formula or one word on both sides."""
    if only_number(right) & only_number(answer):
        return True
    words = [re.sub(r"\\(?:text|mathrm|textbf|mbox)\b|[\s{}$.]", "", text).casefold() for text in (right, answer)]
    return (formula(right) != "" and formula(right) == formula(answer)) or (words[0] != "" and words[0] == words[1])


def _latex(text: str) -> str:
    """A formula as LaTeX; a single number without its units and words."""
    values = only_number(text)
    if len(values) == 1:
        (value,) = values
        return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return _signs(text)


def _signs(text: str) -> str:
    """A text with LaTeX in place of the signs that people type."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda raised: f"^{{{raised.group().translate(RAISED)}}}", text)
    text = re.sub(r"(?:√|(?<![\\A-Za-z])sqrt) ?\(([^()]{0,200})\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    return "".join(SIGNS.get(character, character) for character in text)
