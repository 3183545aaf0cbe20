"""Forms of answers are compiled on trial first, in a process where a failure harms nobody, and only then by the engine.

No limit of a form's size finds every form that kills its compiler, or keeps it busy for minutes. So every replica has
another process (`serving.replica.trial_process`) that compiles each new form with limits of time and memory. Forms that
take long are compiled one after the other, so that they do not delay other forms.
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
from serving.replica.grammar import Form
from serving.replica.trial_process import LENGTH, frame
from serving.schema import RequestError, error_reply

logger = logging.getLogger("ray.serve")

TrialOutcome = Literal["ok", "error", "time", "memory", "crash", "busy"]

MAX_RESULTS = 1024
"""How many results are remembered."""
QUICK_S = 0.5
"""CPU seconds within which ordinary forms are compiled; slower forms are compiled one after the other."""
QUICK_AT_ONCE = 4
MAX_WAITING = 8
"""Most slow forms that may wait for one another."""
SECONDS_PER_CPU_SECOND = 10.0
"""Most seconds that may pass for one CPU second, on a machine that has much else to do."""
START_S = 120.0
"""Most seconds until the process has loaded its compiler."""
ORIGIN = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""The place in the compiler's source with which its messages begin."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The result of compiling forms on trial."""

    outcome: TrialOutcome
    message: str = ""
    """The compiler's message."""
    took_s: float = 0.0
    """CPU seconds that it took."""


class _Trial:
    """Forms that are being compiled, for all clients that sent them."""

    def __init__(self, task: asyncio.Task[TrialResult]) -> None:
        self.task = task
        self.num_clients = 0


class Trials:
    """Finds out which forms of answers an engine can compile. It is used from one event loop."""

    def __init__(self, tokenizer: Callable[[], str], limits: LimitsConfig) -> None:
        """
        Args:
            tokenizer: returns xgrammar's serialised TokenizerInfo; it is called in a thread.
        """
        self._tokenizer = tokenizer
        self._limit_s = limits.form_timeout_s
        self._memory_bytes = int(limits.form_memory_mib * 2**20)
        self._results: OrderedDict[str, TrialResult] = OrderedDict()
        self._trials: dict[str, _Trial] = {}
        self._quick, self._slow = asyncio.Semaphore(QUICK_AT_ONCE), asyncio.Semaphore(1)
        self._num_slow = 0
        self._start_lock = asyncio.Lock()
        self._process: _Connection | None = None

    async def check(self, forms: Sequence[Form]) -> float:
        """Checks that an engine can compile the forms. When its last caller is cancelled, the compilation ends.

        Returns:
            CPU seconds that compiling took; 0 if the result was remembered.

        Raises:
            RequestError: 400, the forms cannot be compiled within the limits; 503, too many others are being compiled.
        """
        if not forms:
            return 0.0
        digest = hashlib.sha256(json.dumps([asdict(form) for form in forms]).encode()).hexdigest()
        cached_result = self._results.get(digest)
        result = await self._try(digest, forms) if cached_result is None else cached_result
        took_s = result.took_s if cached_result is None else 0.0
        is_tolerable = result.outcome == "error" and not any(form.is_needed for form in forms)
        if result.outcome != "ok" and not is_tolerable:
            raise self._request_error(result, took_s)
        return took_s

    async def _try(self, digest: str, forms: Sequence[Form]) -> TrialResult:
        trial = self._trials.get(digest)
        if trial is None:
            trial = self._trials[digest] = _Trial(asyncio.create_task(self._compile(forms)))
        trial.num_clients += 1
        try:
            result = await asyncio.shield(trial.task)
        finally:
            trial.num_clients -= 1
            if not trial.num_clients:
                trial.task.cancel()
                self._trials.pop(digest, None)
        if result.outcome != "busy":
            self._results[digest] = result
            if len(self._results) > MAX_RESULTS:
                self._results.popitem(last=False)
        return result

    async def _compile(self, forms: Sequence[Form]) -> TrialResult:
        """Compiles forms: first with little time, and if that is not enough, in the queue of slow forms."""
        async with self._quick:
            result = await self._compile_within(forms, min(QUICK_S, self._limit_s))
        if result.outcome != "time" or self._limit_s <= QUICK_S:
            return result
        if self._num_slow >= MAX_WAITING:
            return TrialResult(outcome="busy")
        self._num_slow += 1
        try:
            async with self._slow:
                slow_result = await self._compile_within(forms, self._limit_s)
            return replace(slow_result, took_s=result.took_s + slow_result.took_s)
        finally:
            self._num_slow -= 1

    async def _compile_within(self, forms: Sequence[Form], cpu_s: float) -> TrialResult:
        async with self._start_lock:
            if self._process is None or self._process.is_closed:
                self._process = await _Connection.open(await asyncio.to_thread(self._tokenizer))
        return await self._process.compile(forms, cpu_s, self._memory_bytes)

    def _request_error(self, result: TrialResult, took_s: float) -> RequestError:
        if result.outcome == "busy":
            message = "Too many large forms of answers are being compiled."
            reply = error_reply(503, message, retry_after_s=self._limit_s)
            return RequestError.from_reply(replace(reply, form_problem=result.outcome))
        reasons = {
            "time": f"it takes longer than {self._limit_s:g} s; use fewer optional properties and smaller limits of "
            "lengths and repeats",
            "memory": f"it takes more than {self._memory_bytes // 2**20} MiB",
            "crash": "it is nested too deeply, or too large",
        }
        reason = reasons.get(result.outcome, ORIGIN.sub("", result.message).strip()[:500])
        reply = error_reply(400, f"The form of answer that was asked for cannot be compiled: {reason}")
        return RequestError.from_reply(replace(reply, form_s=took_s, form_problem=result.outcome))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()


class _Connection:
    """The connection to the process that compiles."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: Any) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._futures: dict[int, asyncio.Future[TrialResult]] = {}
        self._last_id = 0
        self.is_closed = False
        self._read_task = asyncio.create_task(self._read_results())

    @classmethod
    async def open(cls, tokenizer: str) -> _Connection:
        """Starts the process, and returns when it has loaded its compiler."""
        parent_socket, child_socket = socket.socketpair()
        with child_socket:
            command = [sys.executable, "-m", "serving.replica.trial_process", str(child_socket.fileno())]
            # GPUs belong to the engine alone.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen(
                command,
                pass_fds=[child_socket.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                # Not a session of its own: Linux would take that for a group of tasks, with as much of the cores as all
                # other sessions together, whatever its priority.
                process_group=0,
            )
        reader, writer = await asyncio.open_connection(sock=parent_socket)
        try:
            writer.write(frame({"tokenizer": tokenizer}))
            async with asyncio.timeout(START_S):
                await _next_message(reader)
        except BaseException:
            process.kill()
            raise
        return cls(process, reader, writer)

    async def compile(self, forms: Sequence[Form], cpu_s: float, memory_bytes: int) -> TrialResult:
        """Compiles forms in a child of the process. The child is killed if this call is cancelled."""
        self._last_id += 1
        id = self._last_id
        future: asyncio.Future[TrialResult] = asyncio.get_running_loop().create_future()
        self._futures[id] = future
        form_messages = [{"kind": form.kind, "text": form.text, "is_exact": form.is_exact} for form in forms]
        try:
            self._send({"id": id, "forms": form_messages, "cpu_s": cpu_s, "memory_bytes": memory_bytes})
            async with asyncio.timeout(SECONDS_PER_CPU_SECOND * cpu_s):
                return await future
        except TimeoutError:
            return TrialResult(outcome="time", took_s=cpu_s)
        finally:
            if self._futures.pop(id, None) is not None:
                self._send({"cancel": id})

    def close(self) -> None:
        """Ends the process, which ends its children."""
        self.is_closed = True
        self._process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        if not self.is_closed:
            self._writer.write(frame(message))

    async def _read_results(self) -> None:
        """Hands every result to its caller, until the process ends; then all callers get `busy`."""
        try:
            while True:
                message = await _next_message(self._reader)
                future = self._futures.pop(message["id"], None)
                if future is not None and not future.done():
                    future.set_result(
                        TrialResult(outcome=message["outcome"], message=message["message"], took_s=message["took_s"])
                    )
        except (asyncio.IncompleteReadError, OSError):
            logger.exception("The process that compiles forms of answers ended; the next form starts another one")
        self.is_closed = True
        self._writer.close()
        await asyncio.to_thread(self._process.wait)
        for future in self._futures.values():
            if not future.done():
                future.set_result(TrialResult(outcome="busy"))


async def _next_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    message: dict[str, Any] = json.loads(await reader.readexactly(length))
    return message
