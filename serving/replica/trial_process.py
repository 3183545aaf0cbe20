"""The process of `serving.replica.trial`: it compiles the forms of each request in a child of its own, which may die.

It loads the compiler and the tokenizer once and has a single thread, so that it can fork a child within milliseconds.
Messages in both directions are JSON after their length (4 bytes). The first message is `{"tokenizer"}`, and its answer
`{"ready"}`. Then come `{"id", "forms", "cpu_s", "memory_bytes"}`, whose answer is
`{"id", "outcome", "message", "took_s"}`, and `{"cancel": id}`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import selectors
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

LENGTH = struct.Struct("!I")
MAX_OUTPUT = 65536
"""Most bytes that are read of what the compiler prints about a form."""
STACK_BYTES = 4 * 2**20
"""Half of the stack of an engine's thread, so that a recursion fails here before it could kill an engine."""
NICENESS = 10
"""Lower priority than answers, also while the compiler is loaded, which takes seconds of CPU time."""
WARNING = re.compile(r"Warning: (.+)")
"""A line of the compiler about a part of a form that it passes over."""


@dataclass(frozen=True, kw_only=True)
class _Child:
    """A process that compiles the forms of one request."""

    id: int
    pid: int
    result: int
    """File descriptor from which the result is read; it is closed without a result if the child died."""


class TrialProcess:
    """Starts the children, ends them, and sends their results."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}
        self._tokenizer: Any = None

    def run(self) -> None:
        """Carries out messages until the other side closes the connection."""
        import xgrammar

        first_message = receive(self._connection)
        if first_message is None:
            return
        self._tokenizer = xgrammar.TokenizerInfo.deserialize_json(first_message["tokenizer"])
        gc.freeze()  # so that the children share the memory of what is loaded
        send(self._connection, {"ready": True})
        self._selector.register(self._connection, selectors.EVENT_READ)
        try:
            while self._step():
                pass
        finally:
            for child in self._children.values():
                os.kill(child.pid, signal.SIGKILL)

    def _step(self) -> bool:
        for key, _ in self._selector.select():
            if isinstance(key.data, _Child):
                self._report(key.data)
            else:
                message = receive(self._connection)
                if message is None:
                    return False
                self._handle(message)
        return True

    def _handle(self, message: dict[str, Any]) -> None:
        if "cancel" not in message:
            self._start(message)
        elif (child := self._children.get(message["cancel"])) is not None:
            os.kill(child.pid, signal.SIGKILL)

    def _start(self, message: dict[str, Any]) -> None:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                self._connection.close()
                _limit(message["cpu_s"], message["memory_bytes"])
                os.write(write_end, json.dumps(self._compile(message["forms"], _divert_output())).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        child = _Child(id=message["id"], pid=pid, result=read_end)
        self._children[child.id] = child
        self._selector.register(read_end, selectors.EVENT_READ, child)

    def _compile(self, forms: list[dict[str, Any]], output: int) -> dict[str, str]:
        """Returns the result of compiling forms.

        Args:
            output: file descriptor of what the compiler prints.
        """
        import xgrammar

        # The settings are vLLM's, so that what fails in an engine fails here. The one thread has the limited stack.
        compiler = xgrammar.GrammarCompiler(self._tokenizer, max_threads=1, cache_enabled=True)
        bitmask = xgrammar.allocate_token_bitmask(1, self._tokenizer.vocab_size)
        try:
            for form in forms:
                os.lseek(output, 0, os.SEEK_SET)
                os.truncate(output, 0)
                matcher = xgrammar.GrammarMatcher(compile_form(compiler, form["kind"], form["text"]))
                matcher.fill_next_token_bitmask(bitmask, 0)
                if not bitmask.any():
                    return {"outcome": "error", "message": "no answer can have this form"}
                warning = WARNING.search(os.pread(output, MAX_OUTPUT, 0).decode(errors="replace"))
                if form["is_exact"] and warning is not None:
                    return {"outcome": "error", "message": f"an answer may break it. {warning[1]}"[:2000]}
        except Exception as error:  # of any kind: it is the form's fault
            return {"outcome": "memory" if "bad_alloc" in str(error) else "error", "message": str(error)[:2000]}
        except MemoryError:
            return {"outcome": "memory", "message": ""}
        return {"outcome": "ok", "message": ""}

    def _report(self, child: _Child) -> None:
        result = os.read(child.result, 65536)
        self._selector.unregister(child.result)
        os.close(child.result)
        del self._children[child.id]
        _, status, usage = os.wait4(child.pid, 0)
        outcome = json.loads(result) if result else {"outcome": _death(status), "message": ""}
        send(self._connection, {"id": child.id, "took_s": usage.ru_utime + usage.ru_stime, **outcome})


def compile_form(compiler: Any, kind: str, text: str) -> Any:
    """Compiles one form as vLLM's backend for xgrammar does."""
    if kind == "json":
        return compiler.compile_json_schema(text, any_whitespace=True)
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "ebnf":
        return compiler.compile_grammar(text)
    if kind == "lark":
        return compiler.compile_lark(text)
    return _compile_tag(compiler, text)


def _compile_tag(compiler: Any, text: str) -> Any:
    import xgrammar

    tag = json.loads(text)
    if "structures" not in tag:
        return compiler.compile_structural_tag(text)
    items = [
        xgrammar.StructuralTagItem(begin=item["begin"], schema=json.dumps(item["schema"]), end=item["end"])
        for item in tag["structures"]
    ]
    return compiler.compile_structural_tag(items, tag["triggers"])


def _limit(cpu_s: float, memory_bytes: int) -> None:
    """Sets the limits at which this process ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _divert_output() -> int:
    """Has what this process prints written to a file in memory, since the compiler's warnings quote the client's form.

    Returns:
        The file's descriptor.
    """
    output = os.memfd_create("output")
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    return output


def _death(status: int) -> str:
    return "time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF else "crash"


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message."""
    connection.sendall(frame(message))


def frame(message: dict[str, Any]) -> bytes:
    """Returns a message as it is sent: its length and its JSON."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Returns the next message; None when the other side has closed the connection."""
    head = _read(connection, LENGTH.size)
    body = _read(connection, LENGTH.unpack(head)[0]) if head else b""
    message: dict[str, Any] | None = json.loads(body) if body else None
    return message


def _read(connection: socket.socket, size: int) -> bytes:
    text = b""
    while len(text) < size:
        piece = connection.recv(size - len(text))
        if not piece:
            return b""
        text += piece
    return text


if __name__ == "__main__":
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the replica
    TrialProcess(socket.socket(fileno=int(sys.argv[1]))).run()
