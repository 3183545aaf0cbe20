"""The process behind the rule `math`: reads pairs of a right answer and an answer, and says whether they are equal.

It runs as a file, does not import raylign, and may be killed at any time, because a policy writes the texts that it
computes with. Each line of its input is `[right, answer]` as JSON; a null for the answer only tests whether the right
answer can be read. Each line of its output is `[the right answer can be read, they are equal]`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MAX_MEMORY = 2 << 30
"""Bytes of address space. A power of powers could use all memory of the machine."""


def main() -> None:
    """Compares the pairs of the input; the one command-line argument is the timeout of a pair, in seconds."""
    timeout_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the run, which then closes the input
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print, and their output is no answer
    logging.disable(logging.CRITICAL)
    compare("$x^2$", "$x$")  # importing the library and building its grammar takes longer than any limit

    print("ready", file=output, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # without a handler it ends the process
        right, answer = json.loads(line)
        result = compare(right, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), file=output, flush=True)


def compare(right: str, answer: str | None) -> tuple[bool, bool]:
    """Returns whether the right answer can be read, and whether the answer equals it."""
    from math_verify import parse, verify

    try:
        right_values = parse_right_answer(right)
        if not right_values:
            return False, False
        answer_values = right_values if answer is None else parse(answer, parsing_timeout=None)
        return True, bool(answer_values) and bool(verify(right_values, answer_values, timeout_seconds=None))
    except (Exception, RecursionError) as error:  # the library may raise anything for a text that a policy writes
        logging.debug("%r", error)
        return answer is not None, False


def parse_right_answer(right: str) -> list[Any]:
    """Parses a right answer by math-verify: unchanged if it marks its formula, else as a whole formula."""
    from math_verify import parse

    if "$" in right or "\\(" in right or "\\[" in right:
        return list(parse(right, parsing_timeout=None))
    return list(parse(f"${right}$", parsing_timeout=None) or parse(right, parsing_timeout=None))


if __name__ == "__main__":
    main()
