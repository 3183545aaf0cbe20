"""A process of many writers, to be killed: prints every judgement that was acknowledged to it, as it is."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from serving.feedback.store import Store
from serving.feedback.store.records import Choice, Feedback

WRITERS, ITEMS = 64, 40


def main(url: str) -> None:
    store = Store(url)

    def write(writer: int) -> None:
        for item in range(ITEMS):
            verdict = Choice(winner=f"cmp-{item}-{(writer + item) % 2}")
            key = f"item {item}" if item % 2 else None
            judgement = Feedback(target=f"cmp-{item}", verdict=verdict, labeller=f"writer{writer}", key=key)
            receipt = store.record_feedback(judgement).result()
            os.write(1, f"{writer} {item} {receipt.id}\n".encode())  # at once, and whole

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    store.close()


if __name__ == "__main__":
    main(sys.argv[1])
