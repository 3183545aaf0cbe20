"""DeepSpeed's ZeRO on two real workers: whatever is spread over them, the numbers are those of one plain process."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from alignment import checkpoint
from alignment.batch import Batch
from alignment.data.packing import pack
from alignment.distributed.backends import wrap, wrap_frozen
from alignment.distributed.trainable import TrainableModule
from alignment.distributed.world import World
from alignment.errors import ConfigError
from alignment.groups import Completion, Group
from alignment.models.forward import outputs, scores
from alignment.models.load import LanguageModel, load_model
from alignment.models.roles import Roles
from alignment.rollout.local import greedy
from alignment.settings.data import DataConfig
from alignment.settings.load import check_config
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.run import OptimConfig, RunConfig, ZeroConfig
from tests.conftest import free_port, make_tokenizer
from tests.workers import fork_context

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ZeroConfig()
STAGES = [ZeroConfig(stage=1), ZeroConfig(stage=2), ZeroConfig(stage=3)]
OFFLOADED = [
    ZeroConfig(stage=1, offload_optimizer=True),
    ZeroConfig(stage=2, offload_optimizer=True),
    ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True),
]


def name_of(zero: ZeroConfig) -> str:
    return f"stage {zero.stage}{' offloaded' if zero.offload_optimizer else ''}"


every_stage = pytest.mark.parametrize("zero", STAGES, ids=name_of)
every_kind = pytest.mark.parametrize("zero", STAGES + OFFLOADED, ids=name_of)


class Workers:
    """Two processes with a gloo group between them, which run functions of this file together."""

    def __init__(self, environment: dict[str, str]) -> None:
        context = fork_context()
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, theirs, environment), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the main worker returns; raises what any of them raised."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(120), "a worker does not answer"
            answers.append(pipe.recv())
        for answer in answers:
            assert not isinstance(answer, Trouble), answer.text
        return answers[0]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


@dataclass
class Trouble:
    text: str


def serve(rank: int, port: int, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    while True:
        function, args = pipe.recv()
        try:
            answer = function(World(rank=rank, size=2), *args)
            pipe.send(answer if rank == 0 else None)
        except BaseException:
            pipe.send(Trouble(traceback.format_exc()))


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output head is its own, with weights that two workers cannot halve."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd-model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=33,
        head_dim=16,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how."""

    path: str
    zero: ZeroConfig = PLAIN
    dtype: str = "fp32"
    lora: bool = False
    checkpointing: bool = False
    disturbance: str = ""
    """What happens after the second step besides: `discard`, `nan` or nothing."""
    own_backend: bool = False
    """Whether the backend is the test's own instead of one of raylign's."""

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(lr=1e-3, weight_decay=0.01, max_grad_norm=1.0, zero=self.zero)

    def load(self, **how: Any) -> LanguageModel:
        lora = LoraConfig(rank=3) if self.lora else None
        config = ModelConfig(
            path=self.path,
            dtype=self.dtype,  # type: ignore[arg-type]
            lora=lora,
            gradient_checkpointing=self.checkpointing,
        )
        data = DataConfig(path="none", max_length=64)
        model = load_model(config, data, device=torch.device("cpu"), seed=0, **how)
        model.module.train()
        return model

    def wrap(self, model: LanguageModel, world: World) -> TrainableModule:
        if self.own_backend:
            from tests.alignment.sharded_backend import ShardedBackend

            return ShardedBackend(model.root, self.optim, world)
        return wrap(model.module, self.optim, world, root=model.root)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training run left."""

    losses: list[float]
    """Of every step, in training and, after it, in evaluation."""
    norms: list[float]
    state: dict[str, Tensor]
    full: dict[str, Tensor]
    trained: set[str]
    """Names of the weights that `full` gives if asked for the trained ones only."""


def batches(step: int, world: World) -> list[Batch]:
    """This worker's micro-batches of a step of four groups."""
    draw = random.Random(step)
    groups = [make_group(draw, number) for number in range(4)]
    return [pack([group]) for group in groups[world.rank :: world.size]]


def make_group(draw: random.Random, number: int) -> Group:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 300) for _ in range(count))

    completions = tuple(Completion(text="", tokens=tokens(4), loss_mask=(True,) * 4) for _ in range(2))
    return Group(id=str(number), prompt="", prompt_tokens=tokens(3 + number), completions=completions)


def loss_of(model: LanguageModel, batch: Batch) -> Tensor:
    """A micro-batch's share of the mean over the 32 learned tokens of a step."""
    return -outputs(model, batch).logprobs.sum() / 32


def take_step(model: LanguageModel, trained: TrainableModule, step: int, world: World) -> tuple[float, float]:
    """Loss before, and gradient norm of, one optimizer step."""
    total = torch.zeros(())
    for batch in batches(step, world):
        loss = loss_of(model, batch)
        total += loss.detach()
        trained.backward(loss)
    return float(world.sum(total)), trained.step(1e-3)


@torch.no_grad()
def evaluated(model: LanguageModel, world: World) -> float:
    total = torch.stack([loss_of(model, batch) for batch in batches(99, world)]).sum()
    return float(world.sum(total))


def disturb(kind: str, model: LanguageModel, trained: TrainableModule, world: World) -> None:
    for batch in batches(50, world) if kind else []:
        trained.backward(loss_of(model, batch) * (math.nan if kind == "nan" else 1.0))
    if kind:
        assert not math.isfinite(trained.step(1e-3) if kind == "nan" else trained.discard())


def train(world: World, task: Task, steps: range, state: str | None = None) -> Result:
    """Runs steps, from a file with the state of an earlier run if there is one, whatever was learned before."""
    model = task.load()
    trained = task.wrap(model, world)
    if state is not None:
        take_step(model, trained, 77, world)
        trained.restore(torch.load(state))
    losses, norms = [], []
    for step in steps:
        loss, norm = take_step(model, trained, step, world)
        losses += [loss, evaluated(model, world)]
        norms.append(norm)
        if step == 1:
            disturb(task.disturbance, model, trained, world)
    return Result(
        losses=losses,
        norms=norms,
        state=trained.state(),
        full={name: weight.clone() for name, weight in trained.named_weights()},
        trained={name for name, _ in trained.named_weights(only_trained=True)},
    )


@functools.cache
def train_alone(task: Task, steps: range) -> Result:
    """What one plain process learns from the beginning, to which many runs are compared."""
    return train(World(), task, steps)


def assert_same(one: Result, other: Result, *, rel: float = 1e-5, atol: float = 1e-4) -> None:
    assert other.losses == pytest.approx(one.losses, rel=rel)
    assert other.norms == pytest.approx(one.norms, rel=rel)
    assert other.trained == one.trained
    assert list(other.full) == list(one.full)
    for expected, found in ((one.state, other.state), (one.full, other.full)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0)


@every_kind
def test_five_steps_are_those_of_one_plain_process(workers: Workers, tiny_model: Path, zero: ZeroConfig) -> None:
    plain = train_alone(Task(path=str(tiny_model)), range(5))
    assert_same(plain, workers.run(train, Task(path=str(tiny_model), zero=zero), range(5)))


@every_kind
def test_nothing_is_compiled(workers: Workers, tiny_model: Path, zero: ZeroConfig, extensions_folder: Path) -> None:
    """Of a build that was killed a lock stays, as in this folder, on which every later one would wait for ever."""
    workers.run(train, Task(path=str(tiny_model), zero=zero), range(1))
    assert [path.name for path in extensions_folder.rglob("*")] == ["deepspeed_shm_comm", "lock"]


@every_stage
def test_bf16_weights_follow_fp32_masters(workers: Workers, tiny_model: Path, zero: ZeroConfig) -> None:
    plain = train_alone(Task(path=str(tiny_model), dtype="bf16"), range(3))
    spread = workers.run(train, Task(path=str(tiny_model), dtype="bf16", zero=zero), range(3))
    assert_same(plain, spread, atol=1e-5)
    assert {weight.dtype for weight in spread.full.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in spread.state.values()} == {torch.float32}


@every_stage
def test_only_the_adapter_is_trained_and_asked_for(workers: Workers, tiny_model: Path, zero: ZeroConfig) -> None:
    plain = train_alone(Task(path=str(tiny_model), lora=True), range(3))
    spread = workers.run(train, Task(path=str(tiny_model), lora=True, zero=zero), range(3))
    assert_same(plain, spread)
    assert spread.trained and all("lora_" in name for name in spread.trained)


def test_layers_that_are_computed_again_are_gathered_again(workers: Workers, tiny_model: Path) -> None:
    plain = train_alone(Task(path=str(tiny_model)), range(3))
    task = Task(path=str(tiny_model), zero=ZeroConfig(stage=3), checkpointing=True)
    assert_same(plain, workers.run(train, task, range(3)))


@every_kind
@pytest.mark.parametrize("disturbance", ["discard", "nan"])
def test_a_step_that_is_not_taken_leaves_no_trace(
    workers: Workers, tiny_model: Path, zero: ZeroConfig, disturbance: str
) -> None:
    plain = train_alone(Task(path=str(tiny_model)), range(4))
    task = Task(path=str(tiny_model), zero=zero, disturbance=disturbance)
    assert_same(plain, workers.run(train, task, range(4)))


@every_kind
def test_any_checkpoint_goes_on_anywhere(workers: Workers, odd_model: Path, tmp_path: Path, zero: ZeroConfig) -> None:
    plain, spread = Task(path=str(odd_model)), Task(path=str(odd_model), zero=zero)
    whole = train_alone(plain, range(4))
    second_half = Result(
        losses=whole.losses[4:], norms=whole.norms[2:], state=whole.state, full=whole.full, trained=whole.trained
    )
    torch.save(train_alone(plain, range(2)).state, tmp_path / "plain")
    torch.save(workers.run(train, spread, range(2)).state, tmp_path / "spread")
    assert_same(second_half, workers.run(train, spread, range(2, 4), str(tmp_path / "plain")))
    assert_same(second_half, train(World(), plain, range(2, 4), str(tmp_path / "spread")))
    assert_same(second_half, workers.run(train, spread, range(2, 4), str(tmp_path / "spread")))


@pytest.mark.parametrize("kind", ["tied", "untied", "recomputed"])
def test_a_backend_of_ones_own_shards_decoder_and_head_alike(
    workers: Workers, tiny_model: Path, odd_model: Path, tmp_path: Path, kind: str
) -> None:
    plain = Task(path=str(odd_model if kind == "untied" else tiny_model), checkpointing=kind == "recomputed")
    sharded = dataclasses.replace(plain, own_backend=True)
    whole = train_alone(plain, range(4))
    assert_same(whole, workers.run(train, sharded, range(4)))
    torch.save(train_alone(plain, range(2)).state, tmp_path / "plain")
    resumed = workers.run(train, sharded, range(2, 4), str(tmp_path / "plain"))
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=1e-5)


def frozen_logprobs(world: World, task: Task) -> tuple[Tensor, int]:
    """Log-probabilities of a frozen model, twice, and how many numbers of its projections it still holds whole."""
    model = task.load()
    wrap_frozen(model.root, task.optim, world)
    with torch.no_grad():
        found = torch.stack([outputs(model, batch).logprobs for batch in 2 * batches(0, World())[:1]])
    layers = model.network.get_decoder().layers
    return found, sum(weight.numel() for name, weight in layers.named_parameters() if "proj" in name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_frozen_model_is_spread_and_says_the_same(
    workers: Workers, odd_model: Path, dtype: str, offload: bool
) -> None:
    plain, _ = frozen_logprobs(World(), Task(path=str(odd_model), dtype=dtype))
    zero = ZeroConfig(stage=3, offload_parameters=offload)
    spread, held = workers.run(frozen_logprobs, Task(path=str(odd_model), dtype=dtype, zero=zero))
    torch.testing.assert_close(spread, plain, atol=1e-5, rtol=1e-5)
    assert held < 63 * 33, "between two passes, a worker holds no projection whole"


def train_scores(world: World, task: Task) -> tuple[list[float], list[float]]:
    """Scores and gradient norms of a reward model with its head in fp32."""
    model = task.load(head="score")
    trained = task.wrap(model, world)
    found, norms = [], []
    for step in range(3):
        for batch in batches(step, world):
            said = scores(model, batch)
            trained.backward(said.square().mean() / 4)
        norms.append(trained.step(1e-3))
        found += scores(model, batches(99, World())[0]).tolist()
    return found, norms


@every_stage
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reward_model_scores_the_same(workers: Workers, tiny_model: Path, zero: ZeroConfig, dtype: str) -> None:
    plain, norms = train_scores(World(), Task(path=str(tiny_model), dtype=dtype))
    spread, spread_norms = workers.run(train_scores, Task(path=str(tiny_model), dtype=dtype, zero=zero))
    # ZeRO rounds the fp32 head to bf16 like every weight.
    rel = 1e-4 if dtype == "fp32" else 5e-2
    assert spread == pytest.approx(plain, rel=rel, abs=rel)
    assert spread_norms == pytest.approx(norms, rel=rel)


def train_with_head(world: World, task: Task) -> list[float]:
    """Gradient norms of an actor and of a value head on its trunk, from one loss."""
    model = task.load()
    torch.manual_seed(0)
    head = nn.Linear(64, 1, bias=False)
    actor, critic = task.wrap(model, world), wrap(head, task.optim, world)
    norms = []
    for step in range(3):
        for batch in batches(step, world):
            said = outputs(model, batch, value_head=head)
            assert said.values is not None
            actor.backward((said.values.square().sum() - said.logprobs.sum()) / 32)
        norms += [actor.step(1e-3), critic.step(1e-3)]
    return norms


@every_stage
def test_a_value_head_shares_the_trunk_and_its_loss(workers: Workers, tiny_model: Path, zero: ZeroConfig) -> None:
    plain = train_with_head(World(), Task(path=str(tiny_model)))
    spread = workers.run(train_with_head, Task(path=str(tiny_model), zero=zero))
    assert spread == pytest.approx(plain, rel=1e-5)


def train_actor_and_critic(world: World, task: Task) -> list[float]:
    """Gradient norms of two models that learn from the same batches; in the first step only the critic does."""
    models = [task.load(), task.load(head="score")]
    actor, critic = [task.wrap(model, world) for model in models]
    norms = []
    for step in range(3):
        for batch in batches(step, world):
            actor_loss, critic_loss = loss_of(models[0], batch), scores(models[1], batch).square().mean() / 4
            actor.backward(actor_loss)
            critic.backward(critic_loss)
        norms += [critic.step(1e-3)] + ([actor.step(1e-3)] if step else [])
        if not step:
            actor.discard()
    return norms


@every_stage
def test_two_models_learn_beside_each_other(workers: Workers, tiny_model: Path, zero: ZeroConfig) -> None:
    plain = train_actor_and_critic(World(), Task(path=str(tiny_model)))
    spread = workers.run(train_actor_and_critic, Task(path=str(tiny_model), zero=zero))
    assert spread == pytest.approx(plain, rel=1e-4)


def train_and_save(world: World, task: Task, folder: str) -> list[list[int]]:
    """Saves a model for others after two steps, and returns what it answers itself, before a third."""
    model = task.load()
    trained = task.wrap(model, world)
    for step in range(2):
        take_step(model, trained, step, world)
    weights = trained.gather_weights(only_trained=task.lora)
    if world.is_main:
        model.module.save_pretrained(folder, state_dict=weights)
    answers = greedy(model, [(5, 6, 7), (8, 9)], max_tokens=5)
    assert math.isfinite(take_step(model, trained, 2, world)[1])
    return answers


def saved(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def try_saving(world: World, settings: dict[str, Any]) -> int:
    """Bytes that a checkpoint is known to take, after one without its tensors has been tried."""
    config = RunConfig.model_validate(settings)
    roles = Roles.build(config, world)
    assert checkpoint.try_saving(config, roles, world=world) is None
    return checkpoint._num_bytes(config, roles)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_saving_is_tried_of_what_is_spread_too(
    workers: Workers, run_settings: dict[str, Any], lora: dict[str, int] | None
) -> None:
    settings = {**run_settings, "model": {**run_settings["model"], "lora": lora}, "algorithm": {"name": "sft"}}
    plain = try_saving(World(), settings)
    assert workers.run(try_saving, {**settings, "optim": {"zero": {"stage": 3}}}) == plain


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter"])
def test_what_stage_3_has_learned_is_saved_for_others(
    workers: Workers, tiny_model: Path, odd_model: Path, tmp_path: Path, kind: str
) -> None:
    path = str(odd_model if kind == "untied" else tiny_model)
    plain = Task(path=path, lora=kind == "adapter")
    spread = dataclasses.replace(plain, zero=ZeroConfig(stage=3))
    answers = workers.run(train_and_save, spread, str(tmp_path / "spread"))
    assert train_and_save(World(), plain, str(tmp_path / "plain")) == answers
    expected, found = saved(tmp_path / "plain"), saved(tmp_path / "spread")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"offload_optimizer": True}, "offload_optimizer needs a stage of 1, 2 or 3"),
        ({"stage": 2, "offload_parameters": True}, "offload_parameters needs stage 3: at stage 2"),
    ],
)
def test_what_is_not_spread_cannot_be_offloaded(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_config({"zero": settings}, kind=OptimConfig)
