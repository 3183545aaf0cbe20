"""Forms of answers on trial: compiled first where it hurts nobody, and only then by the engine.

No bound on a form's size catches all that would kill what compiles it, or keep it busy for minutes. So a replica has a
process beside it (`serving.trial_process`) that compiles every form that it has not seen, with limits of time and
memory. Forms that take their time come one after the other, so that they hold up no others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from serving.config import LimitsConfig
from serving.grammar import Form
from serving.schema import Refused, refusal
from serving.trial_process import LENGTH, frame

logger = logging.getLogger("ray.serve")

Outcome = Literal["ok", "error", "time", "memory", "crash", "busy"]

REMEMBERED = 1024
"""Forms whose outcome is known."""
QUICK_S = 0.5
"""CPU seconds within which ordinary forms are compiled; others come one after the other."""
QUICK_AT_ONCE = 4
MAX_WAITING = 8
"""Large forms that may wait for one another."""
SLOWEST = 10.0
"""Seconds that may pass for one of CPU, on a machine that has much else to do."""
START_S = 120.0
"""Until the process has loaded its compiler."""
ORIGIN = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""Where in its source the compiler complains."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of compiling a form."""

    outcome: Outcome
    message: str = ""
    """The compiler's."""
    took_s: float = 0.0
    """CPU seconds."""


class _Trial:
    """A form that is being compiled, for everybody who sent it."""

    def __init__(self, task: asyncio.Task[Verdict]) -> None:
        self.task = task
        self.num_clients = 0


class Trials:
    """Tells which forms of answers an engine can be given. Used from one event loop."""

    def __init__(self, tokenizer: Callable[[], str], limits: LimitsConfig) -> None:
        """
        Args:
            tokenizer: makes xgrammar's serialised TokenizerInfo; called in a thread.
        """
        self._tokenizer = tokenizer
        self._limit_s = limits.form_timeout_s
        self._memory_bytes = int(limits.form_memory_mib * 2**20)
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        self._trials: dict[str, _Trial] = {}
        self._quick, self._slow = asyncio.Semaphore(QUICK_AT_ONCE), asyncio.Semaphore(1)
        self._num_slow = 0
        self._starting = asyncio.Lock()
        self._process: _Connection | None = None

    async def check(self, forms: Sequence[Form]) -> float:
        """Returns if an engine can compile the forms. A caller that is cancelled ends their compilation.

        Returns:
            CPU seconds that it took to find that out; 0 if it was known.

        Raises:
            Refused: 400 if they cannot be compiled within the limits; 503 if others are being compiled.
        """
        if not forms:
            return 0.0
        digest = hashlib.sha256(json.dumps([asdict(form) for form in forms]).encode()).hexdigest()
        known = self._verdicts.get(digest)
        verdict = await self._try(digest, forms) if known is None else known
        took_s = verdict.took_s if known is None else 0.0
        is_tolerable = verdict.outcome == "error" and not any(form.is_needed for form in forms)
        if verdict.outcome != "ok" and not is_tolerable:
            raise self._refused(verdict, took_s)
        return took_s

    async def _try(self, digest: str, forms: Sequence[Form]) -> Verdict:
        trial = self._trials.get(digest)
        if trial is None:
            trial = self._trials[digest] = _Trial(asyncio.create_task(self._verdict(forms)))
        trial.num_clients += 1
        try:
            verdict = await asyncio.shield(trial.task)
        finally:
            trial.num_clients -= 1
            if not trial.num_clients:
                trial.task.cancel()
                self._trials.pop(digest, None)
        if verdict.outcome != "busy":
            self._verdicts[digest] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        return verdict

    async def _verdict(self, forms: Sequence[Form]) -> Verdict:
        async with self._quick:
            verdict = await self._compile(forms, min(QUICK_S, self._limit_s))
        if verdict.outcome != "time" or self._limit_s <= QUICK_S:
            return verdict
        if self._num_slow >= MAX_WAITING:
            return Verdict(outcome="busy")
        self._num_slow += 1
        try:
            async with self._slow:
                slow = await self._compile(forms, self._limit_s)
            return replace(slow, took_s=verdict.took_s + slow.took_s)
        finally:
            self._num_slow -= 1

    async def _compile(self, forms: Sequence[Form], cpu_s: float) -> Verdict:
        async with self._starting:
            if self._process is None or self._process.is_closed:
                self._process = await _Connection.open(await asyncio.to_thread(self._tokenizer))
        return await self._process.compile(forms, cpu_s, self._memory_bytes)

    def _refused(self, verdict: Verdict, took_s: float) -> Refused:
        if verdict.outcome == "busy":
            message = "Too many large forms of answers are being compiled."
            reply = refusal(503, message, retry_after_s=self._limit_s)
            return Refused.by(replace(reply, form_problem=verdict.outcome))
        reasons = {
            "time": f"it takes longer than {self._limit_s:g} s; use fewer optional properties and smaller limits of "
            "lengths and repeats",
            "memory": f"it takes more than {self._memory_bytes // 2**20} MiB",
            "crash": "it is nested too deeply, or too large",
        }
        reason = reasons.get(verdict.outcome, ORIGIN.sub("", verdict.message).strip()[:500])
        reply = refusal(400, f"The form of answer that was asked for cannot be compiled: {reason}")
        return Refused.by(replace(reply, form_s=took_s, form_problem=verdict.outcome))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()


class _Connection:
    """The process beside the replica."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: Any) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._last_id = 0
        self.is_closed = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, tokenizer: str) -> _Connection:
        """Starts the process, and returns when it has loaded its compiler."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "serving.trial_process", str(theirs.fileno())]
            # A GPU is the engine's alone.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(frame({"tokenizer": tokenizer}))
            async with asyncio.timeout(START_S):
                await _next_message(reader)
        except BaseException:
            process.kill()
            raise
        return cls(process, reader, writer)

    async def compile(self, forms: Sequence[Form], cpu_s: float, memory_bytes: int) -> Verdict:
        """Compiles forms in a child of the process, which is killed if this is cancelled."""
        self._last_id += 1
        id = self._last_id
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[id] = verdict
        told = [{"kind": form.kind, "text": form.text} for form in forms]
        try:
            self._send({"id": id, "forms": told, "cpu_s": cpu_s, "memory_bytes": memory_bytes})
            async with asyncio.timeout(SLOWEST * cpu_s):
                return await verdict
        except TimeoutError:
            return Verdict(outcome="time", took_s=cpu_s)
        finally:
            if self._waiting.pop(id, None) is not None:
                self._send({"cancel": id})

    def close(self) -> None:
        """Ends the process, which ends its children."""
        self.is_closed = True
        self._process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        if not self.is_closed:
            self._writer.write(frame(message))

    async def _read(self) -> None:
        try:
            while True:
                message = await _next_message(self._reader)
                verdict = self._waiting.pop(message["id"], None)
                if verdict is not None and not verdict.done():
                    verdict.set_result(
                        Verdict(outcome=message["outcome"], message=message["message"], took_s=message["took_s"])
                    )
        except (asyncio.IncompleteReadError, OSError):
            logger.exception("The process that compiles forms of answers ended; the next form starts another one")
        self.is_closed = True
        self._writer.close()
        await asyncio.to_thread(self._process.wait)
        for verdict in self._waiting.values():
            if not verdict.done():
                verdict.set_result(Verdict(outcome="busy"))


async def _next_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    message: dict[str, Any] = json.loads(await reader.readexactly(length))
    return message
