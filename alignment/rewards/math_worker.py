"""The process behind the rule `math`: reads pairs of a right answer and an answer, and says whether they are equal.

It is run as a file, knows nothing of raylign, and may be killed at any time: what it computes on is what a policy
writes. Each line of input is `[right, answer]` as JSON, with null for an answer where only the right one is tried; each
line of output `[right can be read, they are equal]`.
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
"""Bytes of address space. A power of powers would take more, and the machine with it."""


def main() -> None:
    """Arguments: seconds for a pair."""
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the input
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.disable(logging.CRITICAL)
    compare("$x^2$", "$x$")  # importing the library and building its grammar takes longer than any limit

    print("ready", file=output, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles it: it ends the process, also without a parent
        right, answer = json.loads(line)
        result = compare(right, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), file=output, flush=True)


def compare(right: str, answer: str | None) -> tuple[bool, bool]:
    """Whether the right answer can be read, and whether an answer equals it."""
    from math_verify import parse, verify

    try:
        wanted = read(right)
        if not wanted:
            return False, False
        found = wanted if answer is None else parse(answer, parsing_timeout=None)
        return True, bool(found) and bool(verify(wanted, found, timeout_seconds=None))
    except (Exception, RecursionError) as error:  # of a library, about a text of anyone's
        logging.debug("%r", error)
        return answer is not None, False


def read(right: str) -> list[Any]:
    """A right answer as math-verify has it: as it stands if it says where its formula is, else as a formula."""
    from math_verify import parse

    if "$" in right or "\\(" in right or "\\[" in right:
        return list(parse(right, parsing_timeout=None))
    return list(parse(f"${right}$", parsing_timeout=None) or parse(right, parsing_timeout=None))


if __name__ == "__main__":
    main()
