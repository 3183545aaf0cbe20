"""Watches a run's figures for what ruins it: divergence, collapse, endless answers, an odd sampler, hacked rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alignment.metrics import Metrics
from alignment.settings.run import GuardsConfig

# metric, limit in the configuration, which side of it is bad, and what that means.
LIMITS = (
    ("kl", "max_kl", "above", "nats per completion from the reference: the policy is running away"),
    ("entropy", "min_entropy", "below", "nats per token of entropy: the policy has nearly stopped exploring"),
    ("completions/truncated", "max_truncated", "above", "of the completions do not end: they grow without bound"),
    ("mismatch/mean_abs", "max_mismatch", "above", "nats per token between trainer and sampler: they are out of step"),
)


class Guards:
    """Remembers how long each limit has been broken, and how held-out rewards and judges have moved."""

    def __init__(self, config: GuardsConfig, judges: Sequence[str] = ()) -> None:
        """`judges`: names of the scorers that teach nothing, as they stand in `eval/judges/NAME`."""
        self.config = config
        self.judges = judges
        self._in_a_row: Counter[str] = Counter()
        self._evaluations: list[Metrics] = []

    def watch(self, metrics: Metrics) -> list[str]:
        """What is wrong after a step, in words; empty if nothing is."""
        found = [text for limit in LIMITS if (text := self._broken(*limit, metrics))]
        if "eval/reward" in metrics:
            self._evaluations.append(metrics)
            found += self._hacked()
        return found

    def forget(self) -> None:
        """Starts anew, after a roll-back."""
        self._in_a_row.clear()
        self._evaluations.clear()

    def _broken(self, metric: str, key: str, side: str, meaning: str, metrics: Metrics) -> str | None:
        limit = getattr(self.config, key)
        if not limit or metric not in metrics:
            return None
        value = metrics[metric]
        inside = value <= limit if side == "above" else value >= limit
        self._in_a_row[metric] = 0 if inside else self._in_a_row[metric] + 1
        if self._in_a_row[metric] < self.config.patience:
            return None
        steps = f"for {self._in_a_row[metric]} steps" if self.config.patience > 1 else "now"
        return f"{value:.4g} {meaning} (guards.{key} is {limit:g}, {side} it {steps})"

    def _hacked(self) -> list[str]:
        window = self.config.hacking_window
        if not window or len(self._evaluations) <= window:
            return []
        before, now = self._evaluations[-1 - window], self._evaluations[-1]
        rise = now["eval/reward"] - before["eval/reward"]
        if rise <= 0:
            return []
        return [
            f"held-out reward rose by {rise:.4g} over {window} evaluations while the judge {name!r} fell from "
            f"{before[key]:.4g} to {now[key]:.4g}: the reward may be hacked (guards.hacking_window)"
            for name in self.judges
            if (key := f"eval/judges/{name}") in now and key in before and now[key] < before[key]
        ]
