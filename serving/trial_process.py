"""The process of `serving.trial`: compiles each form of answer in a child of its own, which may die.

It loads the compiler and the tokenizer once and has a single thread, so that a child is there within milliseconds: a
fork. Messages both ways are JSON behind their length (4 bytes). First comes `{"tokenizer"}`, answered by `{"ready"}`;
then `{"id", "forms", "cpu_s", "memory_bytes"}`, answered by `{"id", "outcome", "message", "took_s"}`, and
`{"cancel": id}`.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

LENGTH = struct.Struct("!I")
STACK_BYTES = 4 * 2**20
"""Half of what threads of an engine have, where the same recursion must not end them."""
NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class _Child:
    """A form that is being compiled."""

    id: int
    pid: int
    result: int
    """File descriptor on which it says what came of it; closed without a word if it died."""


class TrialProcess:
    """Starts the children, ends them, and tells what became of them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}
        self._tokenizer: Any = None

    def run(self) -> None:
        """Works until the other side closes the connection."""
        import xgrammar

        first = receive(self._connection)
        if first is None:
            return
        self._tokenizer = xgrammar.TokenizerInfo.deserialize_json(first["tokenizer"])
        gc.freeze()  # what is loaded stays shared with the children
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
                self._tell(key.data)
            else:
                message = receive(self._connection)
                if message is None:
                    return False
                self._obey(message)
        return True

    def _obey(self, message: dict[str, Any]) -> None:
        if "cancel" not in message:
            self._start(message)
        elif (child := self._children.get(message["cancel"])) is not None:
            os.kill(child.pid, signal.SIGKILL)

    def _start(self, message: dict[str, Any]) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                self._connection.close()
                _limit(message["cpu_s"], message["memory_bytes"])
                os.write(writing, json.dumps(self._compile(message["forms"])).encode())
            finally:
                os._exit(0)
        os.close(writing)
        child = _Child(id=message["id"], pid=pid, result=reading)
        self._children[child.id] = child
        self._selector.register(reading, selectors.EVENT_READ, child)

    def _compile(self, forms: list[dict[str, str]]) -> dict[str, str]:
        import xgrammar

        # As vLLM's: what goes wrong in it has to go wrong here. One thread, whose stack is the one that is limited.
        compiler = xgrammar.GrammarCompiler(self._tokenizer, max_threads=1, cache_enabled=True)
        bitmask = xgrammar.allocate_token_bitmask(1, self._tokenizer.vocab_size)
        try:
            for form in forms:
                matcher = xgrammar.GrammarMatcher(compile_form(compiler, form["kind"], form["text"]))
                matcher.fill_next_token_bitmask(bitmask, 0)
        except Exception as error:  # of any kind: what the form has wrong
            return {"outcome": "memory" if "bad_alloc" in str(error) else "error", "message": str(error)[:2000]}
        except MemoryError:
            return {"outcome": "memory", "message": ""}
        return {"outcome": "ok", "message": ""}

    def _tell(self, child: _Child) -> None:
        result = os.read(child.result, 65536)
        self._selector.unregister(child.result)
        os.close(child.result)
        del self._children[child.id]
        _, status, usage = os.wait4(child.pid, 0)
        told = json.loads(result) if result else {"outcome": _death(status), "message": ""}
        send(self._connection, {"id": child.id, "took_s": usage.ru_utime + usage.ru_stime, **told})


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
    """Has this process end at its limits, and be silent until then."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):  # the compiler's warnings quote what was sent
        os.dup2(silence, descriptor)


def _death(status: int) -> str:
    return "time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF else "crash"


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message."""
    connection.sendall(frame(message))


def frame(message: dict[str, Any]) -> bytes:
    """One message as it is sent."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side has closed the connection."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the replica
    TrialProcess(socket.socket(fileno=int(sys.argv[1]))).run()
