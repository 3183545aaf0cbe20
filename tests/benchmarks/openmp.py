"""How threads wait for each other: a stack of linear layers alone and beside busy processes.

`python -m tests.benchmarks.openmp` measures a forward and a backward pass with OpenMP's own way of waiting and with
`OMP_WAIT_POLICY=passive`, which `alignment.environment` sets; `--preload` takes another OpenMP than torch's.

On two cores of an AMD EPYC (AVX512-BF16), November 2026, with half a dozen other programs at work besides:

| | default | passive | |
|---|---|---|---|
| without more busy processes | 10.4 s | 1.3 s | 7.8 × |
| beside two more | 17.5 s | 0.9 s | 20 × |

On the same machine, less busy: 1.5 s and 0.5 s, beside two more 4.5 s and 1.1 s. On a quiet one the two ways are equal
alone (1.7 s of another stack of layers), and beside two busy processes 6.7 s became 1.7 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUM_LAYERS, WIDTH, NUM_TOKENS = 48, 768, 256
POLICIES = ("default", "passive")
MEASURE = "--measure"


def main() -> None:
    """Measures every policy alone and beside busy processes, in turn, and prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.openmp", description=__doc__.partition("\n")[0])
    parser.add_argument("--busy", type=int, default=2, help="other processes that compute all the time")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--iterations", type=int, default=10, help="forward and backward passes of a measurement")
    parser.add_argument("--preload", help="an OpenMP library to use instead of torch's, as Intel's libiomp5.so")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for num_busy in (0, args.busy):
            for policy in POLICIES:
                with busy_processes(num_busy):
                    key = f"{policy}, {num_busy} busy"
                    seconds.setdefault(key, []).append(measure_elsewhere(policy, args.iterations, args.preload))
                    print(f"{key}: {seconds[key][-1]:.3f} s", flush=True)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    ratios = {
        f"default : passive, {num_busy} busy": round(
            medians[f"default, {num_busy} busy"] / medians[f"passive, {num_busy} busy"], 2
        )
        for num_busy in (0, args.busy)
    }
    print(json.dumps({**{key: round(value, 4) for key, value in medians.items()}, **ratios}))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that compute without a pause while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_elsewhere(policy: str, iterations: int, preload: str | None) -> float:
    """Median seconds of an iteration in a process of its own: OpenMP reads its settings once."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if policy == "default" else {"OMP_WAIT_POLICY": policy}
    environment |= {} if preload is None else {"LD_PRELOAD": preload}
    command = [sys.executable, "-m", "tests.benchmarks.openmp", MEASURE, str(iterations)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(iterations: int) -> float:
    """Median seconds of a forward and a backward pass, after two for warming up."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(NUM_LAYERS):
        layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()]
    network, inputs = torch.nn.Sequential(*layers), torch.randn(NUM_TOKENS, WIDTH)
    seconds = []
    for _ in range(iterations + 2):
        started = time.perf_counter()
        network(inputs).square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        print(measure(int(sys.argv[2])))
    else:
        main()
