"""Watches the metrics of a run for failures: divergence, collapse, endless answers, mismatch, and reward hacking."""

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


class RunGuards:
    """The limits of a run: counts how long each has been broken, and follows the rewards of held-out answers."""

    def __init__(self, config: GuardsConfig, eval_rewards: Sequence[str] = ()) -> None:
        """Makes the guards of a run.

        Args:
            eval_rewards: names of the scorers that are used for evaluation only, as in `eval/eval_rewards/NAME`.
        """
        self.config = config
        self.eval_rewards = eval_rewards
        self._broken_steps: Counter[str] = Counter()
        self._evaluations: list[Metrics] = []

    def watch(self, metrics: Metrics) -> list[str]:
        """Checks the metrics of a step; returns the problems in words, or nothing."""
        problems = [text for limit in LIMITS if (text := self._check_limit(*limit, metrics))]
        if "eval/reward" in metrics:
            self._evaluations.append(metrics)
            problems += self._check_hacking()
        return problems

    def reset(self) -> None:
        """Resets all counts, after a roll-back."""
        self._broken_steps.clear()
        self._evaluations.clear()

    def _check_limit(self, metric: str, key: str, side: str, meaning: str, metrics: Metrics) -> str | None:
        """The problem in words if a limit has been broken for long enough."""
        limit = getattr(self.config, key)
        if not limit or metric not in metrics:
            return None
        value = metrics[metric]
        is_within = value <= limit if side == "above" else value >= limit
        self._broken_steps[metric] = 0 if is_within else self._broken_steps[metric] + 1
        if self._broken_steps[metric] < self.config.patience:
            return None
        steps = f"for {self._broken_steps[metric]} steps" if self.config.patience > 1 else "now"
        return f"{value:.4g} {meaning} (guards.{key} is {limit:g}, {side} it {steps})"

    def _check_hacking(self) -> list[str]:
        """The problem in words for each evaluation reward that fell while the held-out reward rose."""
        window = self.config.hacking_window
        if not window or len(self._evaluations) <= window:
            return []
        previous, latest = self._evaluations[-1 - window], self._evaluations[-1]
        rise = latest["eval/reward"] - previous["eval/reward"]
        if rise <= 0:
            return []
        return [
            f"held-out reward rose by {rise:.4g} over {window} evaluations while eval reward {name!r} fell from "
            f"{previous[key]:.4g} to {latest[key]:.4g}: the reward may be hacked (guards.hacking_window)"
            for name in self.eval_rewards
            if (key := f"eval/eval_rewards/{name}") in latest and key in previous and latest[key] < previous[key]
        ]
