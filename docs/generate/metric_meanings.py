"""What a run measures, by the names in `metrics.jsonl` and TensorBoard. `docs/reference/metrics.md` is made of this."""

from __future__ import annotations

import re

EVERY_STEP = {
    "loss": "Loss of the step: the sum of its terms, each the mean over its unit (token, completion or pair).",
    "lr": "Learning rate of the actor; 0 while only the critic learns.",
    "grad_norm": "L2 norm of the actor's gradient, before it is clipped to `optim.max_grad_norm`.",
    "skipped": "Share of the step's updates that were left out because loss or gradient was not finite.",
    "num_tokens": "Tokens of the step over all workers: of every prompt, once, and of all its completions.",
    "perf/seconds": "Seconds that the step took.",
    "perf/tokens_per_second": "`num_tokens` by `perf/seconds`.",
}
PREFERENCES = {
    "loss/NAME": "The loss NAME of a pair, before its weight; reported if `algorithm.loss` is a sum of several.",
    "rewards/chosen": "Reward of the chosen completion: β (log π − log π_ref), or the score of a reward model.",
    "rewards/rejected": "The same of the rejected completion.",
    "rewards/margins": "`rewards/chosen` − `rewards/rejected`.",
    "rewards/accuracies": "Share of the pairs whose chosen completion has the larger reward; a tie counts half.",
    "logps/chosen": "Log-probability of the chosen completion (nats), summed over its tokens.",
    "logps/rejected": "The same of the rejected completion.",
}
REWARD_MODEL = {
    "rewards/accuracies_chosen_longer": "`rewards/accuracies` of the pairs whose chosen completion has more tokens.",
    "rewards/accuracies_chosen_shorter": "`rewards/accuracies` of the pairs whose chosen completion has fewer tokens.",
    "scores/mean": "Score of a completion.",
    "scores/mean_square": "Square of the score of a completion.",
}
SFT = {"nll": "Negative log-likelihood of a token (nats)."}
ROLLOUTS = {
    "reward": "Reward of a completion: the weighted sum of the scorers' rewards.",
    "reward_std": "Standard deviation of `reward` over the completions of the step.",
    "scores/NAME": "Reward that the scorer NAME gave a completion, before its weight.",
    "environment/reward": "Reward that the environment gave a completion, added up over its turns.",
    "kl": "Divergence from the reference, in nats per completion: Σ log π − log π_ref of the sampled tokens.",
    "kl_coefficient": "Price of a nat of divergence in this step.",
    "completions/mean_length": "Tokens of a completion.",
    "completions/truncated": "Share of the completions that ended for lack of room.",
    "groups/equal_rewards": "Share of the groups whose completions all have the same reward.",
    "rollout/oldest_version": "Version of the oldest weights among the completions'; version n are those after step n.",
    "rollout/refills": "Groups that were sampled beyond `groups_per_step`, in place of those that teach nothing.",
    "perf/rollout_seconds": "Seconds in which the completions were sampled, also beside an earlier update.",
    "perf/rollout_tokens_per_second": "Tokens of completions by `perf/rollout_seconds`.",
    "perf/reward_seconds": "Seconds that the scorers took.",
    "perf/update_seconds": "Seconds that the update took.",
    "perf/sync_seconds": "Seconds that bringing the new weights into the engines took.",
}
POLICY_GRADIENT = {
    "entropy": "Entropy of the distribution that a token was sampled from (nats).",
    "policy_loss": "Clipped loss of the policy alone.",
    "ratio": "π / π_old of a token.",
    "clip_ratio": "Share of the ratios that the clipping stopped.",
    "mismatch/mean_abs": "|log π_trainer − log π_sampler| of a token (nats).",
    "mismatch/kl": "KL(sampler ‖ trainer) of a token (nats), estimated by k3.",
    "mismatch/kl_reverse": "KL(trainer ‖ sampler) of a token (nats), estimated likewise.",
    "mismatch/ratio": "π_trainer / π_sampler of a token.",
    "mismatch/left_out": "Share of the completions that the correction by sequences left out.",
}
PPO = {
    "value_loss": "Loss of the critic: half the squared error of a value, clipped.",
    "value": "Value that the critic gives a token's state.",
    "return": "Return that the value of a token is fitted to.",
    "grad_norm_critic": "L2 norm of the critic's gradient, before it is clipped.",
}
EVALUATION = {
    "eval/METRIC": "The metric of the same name on the held-out groups, for algorithms that learn from the data.",
    "eval/reward": "Reward of a held-out answer; one answer to each prompt, with the same seeds every time.",
    "eval/reward_std": "Standard deviation of `eval/reward` over the prompts.",
    "eval/scores/NAME": "Reward that the scorer NAME gave a held-out answer.",
    "eval/eval_rewards/NAME": "Reward that NAME, a scorer of which nothing is learned, gave a held-out answer.",
    "eval/kl": "Divergence of a held-out answer from the reference (nats).",
    "eval/length": "Tokens of a held-out answer.",
    "eval/truncated": "Share of the held-out answers that ended for lack of room.",
}
SECTIONS = {
    "Every step": EVERY_STEP,
    "`dpo`, `online_dpo` and `reward_model`": PREFERENCES,
    "`reward_model`": REWARD_MODEL,
    "`sft`": SFT,
    "Algorithms that learn from the model's own answers": ROLLOUTS,
    "`ppo`, `grpo`, `rloo` and `reinforce++`": POLICY_GRADIENT,
    "`ppo`": PPO,
    "Evaluation": EVALUATION,
}
"""All of it, by what reports it; unless a meaning says otherwise, a metric is a mean over the step."""


def meaning_of(name: str) -> str | None:
    """The meaning of a reported metric; None if it has none here."""
    meanings = {pattern: meaning for section in SECTIONS.values() for pattern, meaning in section.items()}
    for pattern, meaning in meanings.items():
        if pattern != "eval/METRIC" and re.fullmatch(pattern.replace("NAME", ".+"), name):
            return meaning
    return meaning_of(name.removeprefix("eval/")) if name.startswith("eval/") else None
