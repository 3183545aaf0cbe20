"""vLLM beside the trainer: after every sync both say the same, and an engine without whole weights says nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import alignment.rollout.transfer.files as file_transfer
from alignment.data.packing import pack
from alignment.distributed.backends import wrap
from alignment.distributed.trainable import TrainableModule
from alignment.distributed.world import World
from alignment.errors import ConfigError, RolloutError
from alignment.groups import Completion, Group
from alignment.models.forward import outputs
from alignment.models.load import LanguageModel, load_model
from alignment.models.roles import ActorWeights
from alignment.rollout import Prompt, Rollout, Sampling, Weights
from alignment.rollout.pool import EnginePool
from alignment.rollout.transfer import EngineLocations, WeightUpdate
from alignment.rollout.transfer.files import FileWeightTransfer, local_directories
from alignment.settings.data import DataConfig
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.run import OptimConfig, RolloutConfig
from alignment.vllm.engine import RolloutEngine, RolloutEngineSettings, seed_of
from alignment.vllm.local import LOCAL, local_generator
from tests.alignment.bytes_transfer import FOLDER, BytesTransfer
from tests.conftest import make_tokenizer
from tests.processes import engine_processes
from tests.rollouts import submit

REPOSITORY = Path(__file__).parents[2]
MAX_LENGTH = 96
TINY = RolloutConfig(kv_cache_gib=0.05, max_num_seqs=32, timeout_s=120)
PROMPTS = [Prompt(tokens=tuple(range(20 + i, 60 + 2 * i)), seed=i) for i in range(4)]


def sampling(**changed: object) -> Sampling:
    settings = {"num_completions": 3, "max_tokens": 12, "max_length": MAX_LENGTH, "temperature": 1.0, **changed}
    return Sampling(**settings)  # type: ignore[arg-type]


@dataclass
class Trainer:
    """A trainer's side in fp32, whose weights can be moved about."""

    actor: LanguageModel
    backend: TrainableModule
    version: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> Trainer:
        actor = load_model(config, DataConfig(path="-", max_length=MAX_LENGTH), device=torch.device("cpu"), seed=0)
        return cls(actor, wrap(actor.module, OptimConfig(), World()))

    def change(self) -> ActorWeights:
        """Changes every trained weight, as an optimizer step would, and more."""
        torch.manual_seed(self.version)
        with torch.no_grad():
            for weight in self.actor.module.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.05)
        self.version += 1
        return self.weights()

    def weights(self) -> ActorWeights:
        return ActorWeights(actor=self.actor, backend=self.backend, version=self.version)

    @torch.no_grad()
    def mismatch(self, drawn: list[list[Rollout]], *, temperature: float = 1.0) -> Tensor:
        """[T] |log π_trainer − log π_engine| of every drawn token."""
        groups = [
            Group(id="", prompt="", prompt_tokens=prompt.tokens, completions=tuple(map(completion, rollouts)))
            for prompt, rollouts in zip(PROMPTS, drawn, strict=True)
        ]
        batch = pack(groups)
        self.actor.module.eval()
        ours = outputs(self.actor, batch, temperature=temperature).logprobs[batch.loss_mask]
        theirs = torch.tensor([logprob for each in drawn for rollout in each for logprob in rollout.logprobs])
        return (ours - theirs).abs()


def completion(rollout: Rollout) -> Completion:
    return Completion(text="", tokens=rollout.tokens, loss_mask=(True,) * len(rollout.tokens))


def settings_of(config: ModelConfig) -> RolloutEngineSettings:
    return RolloutEngineSettings.for_run(config, TINY, max_length=MAX_LENGTH, device="cpu", threads=1)


def assert_equal_within_rounding(mismatch: Tensor) -> None:
    print(f"mean {mismatch.mean():.1e}, max {mismatch.max():.1e}")
    assert mismatch.mean() < 1e-4
    assert mismatch.max() < 1e-3


def write_model(folder: Path, *, tied: bool) -> Path:
    """A random two-layer Llama in fp32 with 32 numbers per attention head, the least that vLLM takes on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The small model without and with tied embeddings."""
    return {tied: write_model(tmp_path_factory.mktemp("model"), tied=tied) for tied in (False, True)}


@dataclass
class Pair:
    """A trainer and an engine of its model."""

    trainer: Trainer
    engine: EnginePool

    def sync(self) -> None:
        self.engine.load(self.trainer.change())


@pytest.fixture(scope="module", params=["tied", "untied", "adapter"])
def pair(request: pytest.FixtureRequest, models: dict[bool, Path]) -> Iterator[Pair]:
    """The engine with an untied head gets its weights as bytes, the others as files."""
    untied = request.param == "untied"
    lora = LoraConfig(rank=4, alpha=8.0) if request.param == "adapter" else None
    config = ModelConfig(path=str(models[not untied]), dtype="fp32", lora=lora)
    settings = settings_of(config)
    before = set(engine_processes())
    engine = local_generator(with_bytes(settings) if untied else settings)
    found = Pair(Trainer.of(config), engine)
    found.sync()
    yield found
    engine.close()
    assert set(engine_processes()) <= before
    assert not files_of_weights()


def with_bytes(settings: RolloutEngineSettings) -> RolloutEngineSettings:
    rollout = settings.rollout.model_copy(update={"weight_transfer": "tests.alignment.bytes_transfer:BytesTransfer"})
    return dataclasses.replace(settings, rollout=rollout)


def files_of_weights() -> list[Path]:
    """What this process has written for its engines."""
    return [path for folder in local_directories() for path in folder.glob(f"{LOCAL}{os.getpid()}*")]


def test_after_every_sync_engine_and_trainer_say_the_same(pair: Pair) -> None:
    (process,) = engine_processes()
    memory = []
    for _ in range(10):
        pair.sync()
        drawn = submit(pair.engine, PROMPTS, sampling())()
        assert {rollout.weight_version for each in drawn for rollout in each} == {pair.trainer.version}
        assert_equal_within_rounding(pair.trainer.mismatch(drawn))
        memory.append(process.memory_info().rss)
    assert memory[-1] - memory[5] < 32 << 20, "what is kept of an update should not add up"


def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(pair: Pair) -> None:
    drawn = submit(pair.engine, PROMPTS, sampling(temperature=0.6))()
    assert_equal_within_rounding(pair.trainer.mismatch(drawn, temperature=0.6))


def test_the_same_seeds_draw_the_same_and_others_something_else(pair: Pair) -> None:
    once, again = (submit(pair.engine, PROMPTS, sampling())() for _ in range(2))
    assert tokens_of(once) == tokens_of(again)
    assert len({rollout.tokens for rollout in once[0]}) > 1, "completions of one prompt differ"
    others = [Prompt(tokens=prompt.tokens, seed=prompt.seed + 100) for prompt in PROMPTS]
    assert tokens_of(submit(pair.engine, others, sampling())()) != tokens_of(once)


def tokens_of(drawn: list[list[Rollout]]) -> list[tuple[int, ...]]:
    return [rollout.tokens for rollouts in drawn for rollout in rollouts]


def test_a_completion_ends_with_its_end_token_or_for_lack_of_room(pair: Pair) -> None:
    free = submit(pair.engine, PROMPTS, sampling(max_tokens=30))()
    assert all(rollout.truncated and len(rollout.tokens) == 30 for each in free for rollout in each)
    end = free[0][0].tokens[9]
    ended = submit(pair.engine, PROMPTS, sampling(max_tokens=30, end_tokens=frozenset({end})))()
    for rollout, longer in zip(ended[0], free[0], strict=True):
        length = longer.tokens.index(end) + 1 if end in longer.tokens else 30
        assert rollout.tokens == longer.tokens[:length]
        assert rollout.truncated == (end not in longer.tokens)
        assert len(rollout.logprobs) == length


def test_prompt_and_completion_fit_together_into_the_window(pair: Pair) -> None:
    long = Prompt(tokens=tuple(range(20, 20 + MAX_LENGTH - 2)), seed=0)
    ((rollout, *_),) = submit(pair.engine, [long], sampling())()
    assert len(rollout.tokens) == 2
    assert rollout.truncated
    with pytest.raises(RolloutError, match="96 tokens leaves no room within 96"):
        submit(pair.engine, [Prompt(tokens=(5,) * MAX_LENGTH, seed=0)], sampling())()


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_more_prompts_than_fit_into_one_pass_are_all_answered(pair: Pair) -> None:
    tokens = torch.randint(5, 340, (40, MAX_LENGTH - 6), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(tokens=tuple(row), seed=number) for number, row in enumerate(tokens)]
    drawn = submit(pair.engine, prompts, sampling(num_completions=1))()
    assert [len(rollouts) for rollouts in drawn] == [1] * 40
    assert all(slot.generation == 0 for slot in pair.engine.slots), "no engine was lost over it"


def test_what_is_being_drawn_when_weights_come_is_drawn_from_the_old_ones(pair: Pair) -> None:
    version = pair.trainer.version
    wait = submit(pair.engine, PROMPTS, sampling(max_tokens=40))
    pair.sync()
    assert {rollout.weight_version for each in wait() for rollout in each} == {version}
    assert_equal_within_rounding(pair.trainer.mismatch(submit(pair.engine, PROMPTS, sampling())()))


def test_weights_that_overflowed_spoil_nothing_after_them(pair: Pair) -> None:
    """As after a step that diverged, which the run's guard takes back."""
    trained = [(name, weight) for name, weight in pair.trainer.actor.module.named_parameters() if weight.requires_grad]
    changed = [weight for name, weight in trained if "lora_" in name or "down_proj" in name]
    sound = [weight.detach().clone() for weight in changed]
    with torch.no_grad():
        for weight in changed:
            weight.fill_(1e38)
    pair.trainer.version += 1
    pair.engine.load(pair.trainer.weights())
    spoilt = submit(pair.engine, PROMPTS, sampling(num_completions=8))()
    assert not any(math.isfinite(logprob) for each in spoilt for rollout in each for logprob in rollout.logprobs)
    with torch.no_grad():
        for weight, value in zip(changed, sound, strict=True):
            weight.copy_(value)
    pair.trainer.version += 1
    pair.engine.load(pair.trainer.weights())
    for _ in range(5):
        drawn = submit(pair.engine, PROMPTS, sampling())()
        assert_equal_within_rounding(pair.trainer.mismatch(drawn))


class Failure(Exception):
    """Of the sender."""


@dataclass
class Failing:
    """Weights of which only the first comes."""

    weights: ActorWeights
    version: int = 0

    def save_adapter(self, folder: Path) -> bool:
        raise Failure

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield next(self.weights.named_weights())
        raise Failure


def test_a_sender_that_fails_half_way_leaves_nothing_to_draw_from(pair: Pair) -> None:
    weights = pair.trainer.change()
    with pytest.raises(Failure):
        pair.engine.load(Failing(weights))
    with pytest.raises(RolloutError, match="no weights"):
        submit(pair.engine, PROMPTS, sampling())
    pair.engine.load(weights)
    assert_equal_within_rounding(pair.trainer.mismatch(submit(pair.engine, PROMPTS, sampling())()))


@pytest.mark.parametrize("pair", ["untied", "adapter"], indirect=True)
def test_an_engine_says_what_the_trainer_says_with_weights_that_never_were_files_of_the_trainer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slot,) = pair.engine.slots
    assert isinstance(slot.handle, RolloutEngine)
    if slot.handle.settings.model.lora is not None:  # only all weights need a transfer that the engine knows of
        pair.engine.transfer.clear()
        settings = with_bytes(slot.handle.settings)
        bytes_transfer = settings.transfer_class("bytes", EngineLocations(are_here=lambda: True))
        monkeypatch.setattr(slot.handle, "settings", settings)
        monkeypatch.setattr(pair.engine, "transfer", bytes_transfer)
    assert isinstance(pair.engine.transfer, BytesTransfer)
    num_updates = pair.engine.transfer.num_updates
    for num_syncs in (1, 2):
        pair.sync()
        rollouts = submit(pair.engine, PROMPTS, sampling())()
        assert {rollout.weight_version for group in rollouts for rollout in group} == {pair.trainer.version}
        assert_equal_within_rounding(pair.trainer.mismatch(rollouts))
        assert pair.engine.transfer.num_updates == num_updates + num_syncs
    assert not files_of_weights()
    shutil.rmtree(FOLDER / str(os.getpid()), ignore_errors=True)


class Damaging(FileWeightTransfer):
    """Loses the last file of what it writes."""

    def send(self, weights: Weights, *, adapter: bool) -> WeightUpdate:
        update = super().send(weights, adapter=adapter)
        Path(update.update_info["files"][-1]).unlink()
        return update


@pytest.mark.slow  # an engine starts again
@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_half_an_update_is_an_error_and_an_engine_that_took_it_is_replaced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_transfer, "SHARD_BYTES", 50_000)  # several files, of which the first ones are whole
    processes = set(engine_processes())
    good = pair.engine.transfer
    assert isinstance(good, FileWeightTransfer)
    pair.engine.transfer = Damaging(good.name, good.directories)
    with pytest.raises(RolloutError, match="could not be loaded"):
        pair.engine.load(pair.trainer.change())
    pair.engine.transfer = good
    with pytest.raises(RolloutError, match="no weights"):
        submit(pair.engine, PROMPTS, sampling())
    with pytest.raises(RolloutError, match="stale"):
        asyncio.run(pair.engine.slots[0].handle.generate(PROMPTS[0], sampling()))
    pair.sync()
    assert not processes & set(engine_processes())
    assert_equal_within_rounding(pair.trainer.mismatch(submit(pair.engine, PROMPTS, sampling())()))


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_an_engine_that_is_killed_is_replaced_and_every_prompt_is_answered(pair: Pair) -> None:
    (process,) = engine_processes()
    expected = submit(pair.engine, PROMPTS, sampling(max_tokens=40))()
    wait = submit(pair.engine, PROMPTS, sampling(max_tokens=40))
    time.sleep(0.05)
    process.kill()
    drawn = wait()
    assert tokens_of(drawn) == tokens_of(expected)
    assert {rollout.weight_version for each in drawn for rollout in each} == {pair.trainer.version}
    assert_equal_within_rounding(pair.trainer.mismatch(drawn))
    assert process not in engine_processes()


WITHOUT_TYING = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}
from alignment.vllm import arguments, reload
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

folder, file, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=96,
          kv_cache_memory_bytes=50_000_000, weight_transfer_config=WeightTransferConfig(backend=arguments.BACKEND),
          worker_extension_cls=arguments.WORKER)
llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"transfer": "files"}))
tie, found = reload.pack_again, {}
for name, tied in (("without", lambda model: None), ("with", tie)):
    reload.pack_again = tied
    llm.start_weight_update()
    llm.update_weights(WeightTransferUpdateRequest(update_info={"files": [file]}))
    llm.finish_weight_update()
    llm.reset_prefix_cache()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    found[name] = [known[token].logprob for known, token in zip(output.prompt_logprobs[1:], tokens[1:])]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow  # an engine of its own, to show what vLLM does by itself
def test_without_its_tying_the_output_head_would_stay_the_old_one(models: dict[bool, Path], tmp_path: Path) -> None:
    trainer = Trainer.of(ModelConfig(path=str(models[True]), dtype="fp32"))
    update = FileWeightTransfer("update", (tmp_path,)).send(trainer.change(), adapter=False)
    tokens = list(range(20, 60))
    command = [
        sys.executable,
        "-c",
        WITHOUT_TYING,
        str(models[True]),
        update.update_info["files"][0],
        json.dumps(tokens),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=200, check=False)
    assert "FOUND" in ended.stdout, ended.stderr[-2000:]
    found = json.loads(ended.stdout.partition("FOUND")[2])
    trainer.actor.network.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = trainer.actor.network.eval()(torch.tensor([tokens])).logits[0, :-1]
    ours = logits.log_softmax(1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    assert (torch.tensor(found["with"]) - ours).abs().max() < 1e-3
    assert (torch.tensor(found["without"]) - ours).abs().mean() > 0.01


def test_an_engine_draws_nothing_before_it_has_weights() -> None:
    engine = RolloutEngine(settings_of(ModelConfig()))
    with pytest.raises(RolloutError, match="stale"):
        asyncio.run(engine.generate(PROMPTS[0], sampling()))


def test_a_rank_that_no_engine_takes_is_refused_before_the_start() -> None:
    with pytest.raises(ConfigError, match=r"rank 600.* 512 at most"):
        settings_of(ModelConfig(lora=LoraConfig(rank=600)))


def test_completions_of_neighbouring_seeds_share_no_randomness() -> None:
    seeds = [seed_of(Prompt(tokens=(1,), seed=seed), k) for seed in range(50) for k in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**63


@pytest.mark.slow  # two imports of vLLM; tests/cluster/test_engines.py kills an engine's actor, which is quicker
def test_an_engine_ends_with_the_process_that_started_it_even_if_that_is_killed(models: dict[bool, Path]) -> None:
    code = (
        "import time; from tests.alignment.test_vllm import settings_of, local_generator, ModelConfig\n"
        f"pool = local_generator(settings_of(ModelConfig(path={str(models[True])!r}, dtype='fp32')))\n"
        "print('started', flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "started\n"
    started = engine_processes(of=trainer.pid)
    assert started, "nothing was started"
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
