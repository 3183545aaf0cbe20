"""The rule for mathematical answers: formulas, sets, intervals and matrices, compared by their values.

Hugging Face's library math-verify compares them, in separate processes with limited time and memory, because a policy
may write a formula such as 10^{10^{10}}. (The library's own time limit is a signal, which works only in the main thread
of a process.)
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import ConfigError, RewardError
from alignment.rewards import BuildableScorer, Reward, UnreadableTexts
from alignment.rewards.numbers import marked_text
from alignment.rewards.quantities import MAX_LENGTH, formula, only_number
from alignment.rewards.rules import answer_text, kept_column
from alignment.settings.section import Positive, PositiveCount

if TYPE_CHECKING:
    import torch

    from alignment.groups import Completion, Group

START_S = 120.0
"""Seconds in which a process must start, also on a busy machine."""
GRACE_S = 1.0
"""Seconds after the timeout of a pair in which the process must have ended itself."""
SIGNS = {"π": "\\pi ", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge "}
SIGNS |= {"±": "\\pm ", "°": "^\\circ ", "∪": "\\cup ", "∩": "\\cap ", "–": "-", "−": "-", "—": "-"}
PROGRAM_NUMBER = re.compile(
    r"(?<![\w.\\])(?<!\\text\{)"
    r"(?:\d{1,3}(?:_\d{3})+(?:\.\d+)?|0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|\d+(?:\.\d+)?[eE][-+]?\d{3,})(?!\w)"
)
"""Numbers as only programs write them, as 1_000, 0x10 and 1e400. As formulas they would be 1, 0 · x · 10 and 400 e."""
NO_ANSWERS = frozenset({"nan", "inf", "null"})
"""Texts that programs write for a number that is missing or too large."""
SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


class Math(BuildableScorer):
    """Gives 1 to an answer that is mathematically equal to that of the row, else 0, by the library math-verify.

    The answer is the text after the last `####`, in the last `\\boxed{}`, or a formula near the end of the text. LaTeX
    and plain formulas, fractions, roots, percentages, sets, intervals, equations and matrices are understood.
    """

    name: Literal["math"] = "math"
    """A formula that must equal the right one, as in MATH."""
    column: str = "answer"
    """Column with the right answer: a number, a formula, or a text with one in `\\boxed{}`, `$…$` or after `####`;
    `data.keep` must name it."""
    marked: bool = False
    """Count only answers after `####` or in `\\boxed{}`."""
    timeout_s: Positive = 3.0
    """Seconds after which an answer counts as unreadable."""
    processes: PositiveCount = 2
    """Number of processes that compare answers, for each training worker."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that the rule compares with."""
        return (self.column,)

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the column holds a formula that can be read.

        Raises:
            RewardError: it does not.
            ConfigError: the library math-verify is not installed.
        """
        if (value := columns.get(self.column)) is None:
            return
        right_answer = self.right_answer(value)
        if not (only_number(right_answer) or self.verifier().is_readable(_latex(right_answer))):
            raise RewardError(self.unreadable_text(right_answer))

    def right_answer(self, value: Any) -> str:
        """Returns the right answer in the value of a column.

        Raises:
            RewardError: it holds no formula, or one that is too long.
        """
        whole_text = answer_text(value, self.column, kind="formula")
        text = marked_text(whole_text) or whole_text
        if text.strip().lstrip("+-").casefold() in NO_ANSWERS:
            raise RewardError(
                f"column {self.column!r} holds no formula but {text.strip()!r}; infinity is written \\infty"
            )
        if not text.strip() or len(text) > MAX_LENGTH:
            raise RewardError(
                f"column {self.column!r} holds no formula of at most {MAX_LENGTH} characters: {value!r:.50}"
            )
        return text

    def unreadable_text(self, right_answer: str) -> str:
        """The text of an error about a right answer that cannot be read."""
        return f"column {self.column!r} holds no formula that can be read: {right_answer!r:.50}"

    def verifier(self) -> Verifier:
        """Returns the processes that compare answers, the same at every call.

        Raises:
            ConfigError: the library is not installed.
        """
        return verifier(self.processes, self.timeout_s)

    def build(self, device: torch.device) -> MathScorer:
        """Builds the scorer; the device is not used.

        Raises:
            ConfigError: the library math-verify is not installed.
        """
        return MathScorer(self)


class MathScorer:
    """Compares answers in separate processes."""

    def __init__(self, config: Math) -> None:
        """Makes the scorer; processes are started later.

        Raises:
            ConfigError: the library is not installed.
        """
        self.config = config
        self.unreadable = UnreadableTexts(config)
        self.verifier = config.verifier()

    def score(self, groups: list[Group]) -> list[list[Reward]]:
        """Scores as `Scorer.score` says.

        Raises:
            RewardError: a right answer cannot be read; or an answer cannot, and the configuration asks for an error.
        """
        tasks = [[self._task(completion, group) for completion in group.completions] for group in groups]
        pairs = {task for group_tasks in tasks for task in group_tasks if isinstance(task, AnswerPair)}
        verdicts = self.verifier.verdicts(pairs)
        return [
            [self._reward(group, task, verdicts) if isinstance(task, AnswerPair) else task for task in group_tasks]
            for group, group_tasks in zip(groups, tasks, strict=True)
        ]

    def close(self) -> None:
        """Ends the processes."""
        self.verifier.close()

    def _task(self, completion: Completion, group: Group) -> AnswerPair | Reward:
        """The pair to be compared; or the reward, if no comparison is needed."""
        value = kept_column(group, self.config.column)
        if value is None:
            return None
        try:
            right_answer = self.config.right_answer(value)
        except RewardError as error:
            raise RewardError(f"group {group.id}: {error}") from error
        answer = marked_text(completion.text)
        if answer is None:
            text = completion.text[-MAX_LENGTH:]
            return (
                AnswerPair(right_answer=_latex(right_answer), answer=_signs(text))
                if text.strip() and not self.config.marked
                else 0.0
            )
        if not answer.strip() or len(answer) > MAX_LENGTH:
            return 0.0
        if _is_same(right_answer, answer):
            return 1.0
        return AnswerPair(right_answer=_latex(right_answer), answer=f"\\boxed{{{_latex(answer)}}}")

    def _reward(self, group: Group, pair: AnswerPair, verdicts: Mapping[AnswerPair, MathVerdict | None]) -> float:
        verdict = verdicts[pair]
        if verdict is None:
            return self.unreadable.reward(
                f"group {group.id}: an answer was not compared after {self.config.timeout_s:g} s, or took all memory"
            )
        if not verdict.is_readable:
            raise RewardError(f"group {group.id}: {self.config.unreadable_text(pair.right_answer)}")
        return float(verdict.is_equal)


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """Two answers to be compared."""

    right_answer: str
    answer: str | None
    """The answer; None only tests whether the right answer can be read."""


@dataclass(frozen=True, kw_only=True)
class MathVerdict:
    """The result of a comparison."""

    is_readable: bool
    """Whether the right answer can be read."""
    is_equal: bool
    """Whether the answer equals it."""


class Verifier:
    """Processes that compare answers; one that takes too long is killed and replaced."""

    def __init__(self, processes: int, timeout_s: float) -> None:
        """Makes the pool; processes are started when they are needed.

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

    def is_readable(self, right_answer: str) -> bool:
        """True if a right answer can be read and compared with itself in time."""
        if right_answer not in self._readable:
            verdict = self._compare(AnswerPair(right_answer=right_answer, answer=None))
            self._readable[right_answer] = verdict is not None and verdict.is_readable and verdict.is_equal
        return self._readable[right_answer]

    def verdicts(self, pairs: Collection[AnswerPair]) -> dict[AnswerPair, MathVerdict | None]:
        """Returns the result of every pair; None for a pair that took too long or too much memory."""
        with ThreadPoolExecutor(self.num_processes) as threads:
            return dict(zip(pairs, threads.map(self._compare, pairs), strict=True))

    def close(self) -> None:
        """Ends the processes; a later comparison starts new ones."""
        for _ in range(self.num_processes):
            process = self._idle.get()
            if process is not None:
                process.end()
            self._idle.put(None)

    def _compare(self, pair: AnswerPair) -> MathVerdict | None:
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
    """One process that compares answers."""

    def __init__(self, timeout_s: float) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            RewardError: it did not start in time.
        """
        self.timeout_s = timeout_s
        # -P: this folder has a module `numbers`, which would hide that of Python.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(timeout_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._line(START_S) != b"ready\n":
            self.end()
            raise RewardError(f"the process that compares answers did not start; see {' '.join(command)}")

    @property
    def is_alive(self) -> bool:
        """True if the process runs."""
        return self._process.poll() is None

    def compare(self, pair: AnswerPair) -> MathVerdict | None:
        """Returns the result of a pair; None if it took too long or too much memory, which ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([pair.right_answer, pair.answer]).encode() + b"\n")
            self._process.stdin.flush()
        line = self._line(self.timeout_s + GRACE_S)
        if not line:
            return None
        is_readable, is_equal = json.loads(line)
        return MathVerdict(is_readable=is_readable, is_equal=is_equal)

    def end(self) -> None:
        """Kills the process and closes its pipes."""
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
    """Returns the processes of a configuration; reading rows and rating answers use the same ones."""
    return Verifier(processes, timeout_s)


def _is_same(right_answer: str, answer: str) -> bool:
    """True if no comparison is needed: both are the same number, the same formula or the same words."""
    if only_number(right_answer) & only_number(answer):
        return True
    words = [
        re.sub(r"\\(?:text|mathrm|textbf|mbox)\b|[\s{}$.]", "", text).casefold() for text in (right_answer, answer)
    ]
    return (formula(right_answer) != "" and formula(right_answer) == formula(answer)) or (
        words[0] != "" and words[0] == words[1]
    )


def _latex(text: str) -> str:
    """A formula as LaTeX; of a single number, the number without its units and words."""
    values = only_number(text)
    if len(values) == 1:
        (value,) = values
        return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return _signs(text)


def _signs(text: str) -> str:
    """The text with LaTeX commands in place of signs such as π, √ and superscripts; numbers of programs are words."""
    text = PROGRAM_NUMBER.sub(r"\\text{\g<0>}", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: f"^{{{match.group().translate(SUPERSCRIPT_DIGITS)}}}", text)
    text = re.sub(r"(?:√|(?<![\\A-Za-z])sqrt) ?\(([^()]{0,200})\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    return "".join(SIGNS.get(character, character) for character in text)


SCORERS: dict[str, type[BuildableScorer]] = {"math": Math}
"""The scorers of this module, by the names that configurations have for them."""
