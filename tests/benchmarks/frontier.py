"""Reward against divergence, DPO and PPO on one task: `python -m tests.benchmarks.frontier` from the project's root.

A small version of figure 2 (left) of arXiv 2305.18290. The prompts are beginnings of reviews, the reward is known: a
rule that counts friendly words. DPO learns from pairs of the starting model's own answers, ordered by that rule; PPO
learns from the rule itself, with a value head. Each is trained at several strengths of its pull towards the reference
(β; the price of a nat) with the same number of prompts seen, and measured on the same held-out prompts a few times on
the way. Every measurement is a point: mean reward over mean KL(π ‖ π_ref) per answer, from the answers that it drew. Up
and to the left is better.

Writes FOLDER/frontier.svg and FOLDER/frontier.json; the last line printed is that JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OPENINGS = (
    "I saw this film last night and",
    "The acting in this movie was",
    "After watching the first hour,",
    "My friends told me to see it, and",
    "The story of this film is",
    "What I remember most about it is",
    "The director of this picture",
    "Compared with the book, the movie",
    "The ending of the film",
    "I went to the cinema because",
    "The music in this movie",
    "From the very first scene,",
)
KINDS = (
    "comedy",
    "drama",
    "thriller",
    "documentary",
    "western",
    "love story",
    "war film",
    "musical",
    "crime film",
    "family film",
    "silent film",
    "road movie",
)
DPO_BETAS = (0.05, 0.2, 1.0)
PPO_PRICES = (0.0, 0.03, 0.1)
STEPS, EVERY, PROMPTS_PER_STEP, COMPLETIONS, TOKENS = 15, 5, 16, 4, 32
WIDTH, HEIGHT, EDGE = 640, 420, 56
COLOURS = {"dpo": "#1f6feb", "ppo": "#d1495b"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of one run."""

    method: str
    strength: float
    """β of DPO, or PPO's price of a nat."""
    step: int
    kl: float
    """Nats per answer."""
    reward: float


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"A review of a {kind}: {opening}" for opening in OPENINGS for kind in KINDS]
    rest = [prompt for number, prompt in enumerate(prompts) if number % 4]
    write(args.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in rest])
    if not (args.folder / "pairs.jsonl").exists():
        judged = judged_answers(prompts, args.model)
        write(args.folder / "pairs.jsonl", [row for row in judged if row["prompt"] in rest])
        # DPO wants pairs to evaluate on too; so both methods answer those held-out prompts that have some.
        write(args.folder / "held_out.jsonl", [row for row in judged if row["prompt"] not in rest])
    points = [
        *(point for beta in args.betas for point in measured(args, "dpo", beta)),
        *(point for price in args.prices for point in measured(args, "ppo", price)),
    ]
    (args.folder / "frontier.svg").write_text(drawing(points), encoding="utf-8")
    found = {"points": [asdict(point) for point in points], "best": best(points)}
    (args.folder / "frontier.json").write_text(json.dumps(found), encoding="utf-8")
    for point in points:
        print(
            f"{point.method}  {point.strength:<5g} step {point.step:2}  kl {point.kl:6.2f}  reward {point.reward:+.3f}"
        )
    print(json.dumps(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.frontier", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/frontier"), help="where everything is written")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--betas", type=float, nargs="*", default=DPO_BETAS, help="DPO's β")
    parser.add_argument("--prices", type=float, nargs="*", default=PPO_PRICES, help="PPO's price of a nat")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of DPO, and steps of PPO")
    parser.add_argument("--lr", type=float, default=5e-4, help="DPO's learning rate (LoRA)")
    parser.add_argument("--ppo-lr", type=float, default=3e-4, help="PPO's")
    return parser.parse_args()


def judged_answers(prompts: list[str], model: str) -> list[dict[str, Any]]:
    """Answers of the starting model to each prompt, with the rule's rewards: what DPO learns from."""
    import torch

    from alignment.groups import Completion, Group
    from alignment.models.load import load_tokenizer
    from alignment.rewards.sentiment import Sentiment
    from alignment.rollout import Prompt, Sampling
    from alignment.settings.model import ModelConfig
    from alignment.settings.run import RolloutConfig
    from alignment.vllm.engine import RolloutEngineSettings
    from alignment.vllm.local import local_generator
    from tests.rollouts import submit

    config = ModelConfig(path=model)
    tokenizer, rule = load_tokenizer(config), Sentiment()
    settings = RolloutEngineSettings.for_run(config, RolloutConfig(), max_length=128, device="cpu")
    sampling = Sampling(
        num_completions=COMPLETIONS,
        max_tokens=TOKENS,
        max_length=128,
        temperature=1.0,
        end_tokens=frozenset({tokenizer.eos_token_id}),
    )
    generator = local_generator(settings)
    try:
        generator.load(starting_weights(config, torch.device("cpu")))
        asked = [Prompt(tokens=tuple(tokenizer(text)["input_ids"]), seed=at) for at, text in enumerate(prompts)]
        drawn = submit(generator, asked, sampling)()
    finally:
        generator.close()
    rows = []
    for prompt, rollouts in zip(prompts, drawn, strict=True):
        texts = [tokenizer.decode(rollout.tokens, skip_special_tokens=True) for rollout in rollouts]
        group = Group(id="", prompt=prompt)
        rewards = [rule.reward(Completion(text=text), group) for text in texts]
        usable = [(text, reward) for text, reward in zip(texts, rewards, strict=True) if text.strip()]
        if len({reward for _, reward in usable}) > 1:
            rows.append({"prompt": prompt, "completions": [t for t, _ in usable], "rewards": [r for _, r in usable]})
    return rows


def starting_weights(config: Any, device: Any) -> Any:
    """The starting model as weights for an engine."""
    from alignment.distributed.backends import wrap
    from alignment.distributed.world import World
    from alignment.models.load import load_model
    from alignment.models.roles import ActorWeights
    from alignment.settings.data import DataConfig
    from alignment.settings.run import OptimConfig

    actor = load_model(config, DataConfig(path="-", max_length=128), device=device, seed=0)
    return ActorWeights(actor=actor, backend=wrap(actor.module, OptimConfig(), World()), version=0)


def measured(args: argparse.Namespace, method: str, strength: float) -> list[Point]:
    """Trains at one strength, in a process of its own, and reads what it measured on the way."""
    from alignment.run_folder import RunFolder

    name = f"{method}-{strength:g}"
    file = args.folder / f"{name}.json"
    file.write_text(json.dumps(settings_of(args, method, strength, name)), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "cluster", str(file)], check=True)
    rewards = {"dpo": "eval/eval_rewards/sentiment", "ppo": "eval/reward"}
    return [
        Point(
            method=method,
            strength=strength,
            step=int(line["step"]),
            kl=line["eval/kl"],
            reward=line[rewards[method]],
        )
        for line in RunFolder(args.folder / name).read_metrics()
        if "eval/kl" in line
    ]


def settings_of(args: argparse.Namespace, method: str, strength: float, name: str) -> dict[str, Any]:
    """A run's configuration, as JSON (which is YAML)."""
    shared = {
        "name": name,
        "output": str(args.folder),
        "steps": args.steps,
        "groups_per_step": PROMPTS_PER_STEP,
        "model": {"path": args.model, "lora": {"rank": 16, "alpha": 32}},
        "rollout": {"completions": COMPLETIONS, "max_tokens": TOKENS},
        "optim": {"lr": args.lr, "schedule": "constant", "warmup_ratio": 0.1, "micro_batch_tokens": 2048},
        "evaluate": {"every": EVERY, "samples": 4},
    }
    held_out = {"path": str(args.folder / "held_out.jsonl")}
    if method == "ppo":
        return {
            **shared,
            # The rule's rewards are small and mostly 0, and a new value head knows nothing that GAE could lean on.
            "algorithm": {
                "name": "ppo",
                "epochs_per_step": 2,
                "kl_coefficient": strength,
                "normalise_rewards": True,
                "lam": 1.0,
            },
            "critic": {"trunk": "shared", "lr": 1e-3},
            "optim": {**shared["optim"], "lr": args.ppo_lr},
            "data": {"path": str(args.folder / "prompts.jsonl"), "max_length": 128, "eval": held_out},
            "rewards": [{"name": "sentiment"}],
        }
    return {
        **shared,
        "algorithm": {"name": "dpo", "beta": strength},
        "data": {"path": str(args.folder / "pairs.jsonl"), "max_length": 128, "eval": held_out},
        "eval_rewards": [{"name": "sentiment"}],
    }


def best(points: list[Point]) -> dict[str, dict[str, float]]:
    """Of each method, the point of highest reward."""
    methods = sorted({point.method for point in points})
    tops = {method: max((p for p in points if p.method == method), key=lambda p: p.reward) for method in methods}
    return {method: {"reward": round(top.reward, 4), "kl": round(top.kl, 3)} for method, top in tops.items()}


def drawing(points: list[Point]) -> str:
    """The plot as SVG: a dot per measurement, a line along each run."""
    right = max(point.kl for point in points) * 1.05 or 1.0
    low, high = min(point.reward for point in points), max(point.reward for point in points)
    low, high = low - 0.05, high + 0.05

    def x(kl: float) -> float:
        return EDGE + max(kl, 0.0) / right * (WIDTH - EDGE - 20)

    def y(reward: float) -> float:
        return 30 + (high - reward) / (high - low) * (HEIGHT - EDGE - 30)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for part in range(5):
        value, kl = low + (high - low) * part / 4, right * part / 4
        parts += [
            f'<line x1="{EDGE}" x2="{WIDTH - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>',
            f'<text x="{EDGE - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>',
            f'<text x="{x(kl):.1f}" y="{HEIGHT - EDGE + 18}" text-anchor="middle">{kl:.1f}</text>',
        ]
    for method, strength in sorted({(point.method, point.strength) for point in points}):
        run = [p for p in points if (p.method, p.strength) == (method, strength)]
        line = " ".join(f"{x(p.kl):.1f},{y(p.reward):.1f}" for p in run)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[method]}" stroke-opacity="0.35"/>')
        for p in run:
            label = f"{method} {strength:g}, step {p.step}: reward {p.reward:.3f} at {p.kl:.2f} nats"
            parts.append(
                f'<circle cx="{x(p.kl):.1f}" cy="{y(p.reward):.1f}" r="4" fill="{COLOURS[method]}">'
                f"<title>{label}</title></circle>"
            )
    for number, (method, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{EDGE + 8 + 70 * number}" y="20" fill="{colour}">● {method.upper()}</text>')
    parts += [
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">KL(π ‖ π_ref), nats per answer</text>',
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">mean reward</text>',
        "</svg>",
    ]
    return "\n".join(parts)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
