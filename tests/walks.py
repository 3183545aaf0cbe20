"""Ways through the code that people follow: which function calls which, from a command to what it is about.

Each way is written down once for every form that the code has had, the newest first, so that forms can be compared.
"""

from __future__ import annotations

WALKS: dict[str, list[tuple[str, ...]]] = {
    "functions from `raylign train` to a DPO loss": [
        (
            "cluster.cli:run_command",
            "cluster.launch:train",
            "cluster.launch:run",
            "alignment.train:train",
            "alignment.step:train_step",
            "alignment.step:optimizer_step",
            "alignment.algorithms.dpo:DPO.loss",
            "alignment.losses.preference:sigmoid",
        ),
        (
            "cluster.cli:run_command",
            "cluster.launch:train",
            "cluster.launch:run",
            "cluster.launch:_run_here",
            "alignment.train:train",
            "alignment.train:_Run.to_the_end",
            "alignment.train:_Run._step",
            "alignment.train:_Run._learn",
            "alignment.update:learn",
            "alignment.update:_update",
            "alignment.algorithms.dpo:DPO.loss",
            "alignment.algorithms.dpo:DPO._loss",
            "alignment.losses:sigmoid_preference",
        ),
    ],
    "the same on Ray": [
        (
            "cluster.cli:run_command",
            "cluster.launch:train",
            "cluster.launch:run",
            "cluster.launch:_run_on_ray",
            "cluster.worker:run",
            "alignment.train:train",
            "alignment.step:train_step",
            "alignment.step:optimizer_step",
            "alignment.algorithms.dpo:DPO.loss",
            "alignment.losses.preference:sigmoid",
        ),
        (
            "cluster.cli:run_command",
            "cluster.launch:train",
            "cluster.launch:run",
            "cluster.launch:_run_on_ray",
            "cluster.launch:_fit",
            "cluster.worker:run",
            "alignment.train:train",
            "alignment.train:_Run.to_the_end",
            "alignment.train:_Run._step",
            "alignment.train:_Run._learn",
            "alignment.update:learn",
            "alignment.update:_update",
            "alignment.algorithms.dpo:DPO.loss",
            "alignment.algorithms.dpo:DPO._loss",
            "alignment.losses:sigmoid_preference",
        ),
    ],
}
"""By what is followed: `module:function`, each of which calls the next, or names it in its module."""
