"""One worker or many: the World a loop runs in, and the one function that decides how a module is trained in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.errors import AlignmentError
from alignment.settings.run import OptimConfig

Item = TypeVar("Item")
GRADIENT_BUCKET = 1 << 24
"""Gradient elements (64 MiB in fp32) in one all-reduce."""
ROUND_S = 30.0
"""Longest that workers wait in one collective for what only the main worker does."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This worker's place among the workers; alone, every collective is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, item: Item) -> Item:
        """What the main worker has, on every worker."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, item: Item) -> list[Item]:
        """One item of every worker, by rank, on every worker."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Returns when every worker has come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Closes this worker's connections after an error, so that the others' collectives fail instead of waiting.

        NCCL's would wait for what is under way: there, whoever started the processes ends them all when one has failed,
        as Ray Train and torchrun do.
        """
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def on_every_worker(work: Callable[[], Item] | None, world: World) -> Item:
    """What the main worker's `work` returns, on every worker; what it raises is raised everywhere, so none waits.

    However long it takes, no collective waits longer than `ROUND_S`. It runs in a thread, and must use no collective.

    Args:
        work: None on the other workers.
    """
    if world.size == 1:
        assert work is not None
        return work()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(work) if work is not None else None
        while not world.from_main(running is not None and bool(wait([running], ROUND_S).done)):
            pass
    result: Item | None = None
    error: AlignmentError | None = None
    if running is not None:
        try:
            result = running.result()
        except AlignmentError as raised:
            error = raised
    result, error = world.from_main((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def together(work: Callable[[], Item], world: World) -> Item:
    """Does `work` on every worker; what one raises is raised by all, so that none waits for another."""
    result: Item | None = None
    error: AlignmentError | None = None
    try:
        result = work()
    except AlignmentError as raised:
        error = raised
    for problem in world.gather(error):
        if problem is not None:
            raise problem
    return result  # type: ignore[return-value]


class Trained(ABC):
    """A module, the fp32 master copy of its trained weights, and the optimizer over them.

    Gradients of all micro-batches and of all workers are summed, never averaged: a loss must already be divided by
    global counts.
    """

    module: nn.Module
    """What forward passes use."""
    world: World
    lockstep = False
    """True if forward and backward passes are collectives, so that every worker must run equally many of them."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds this loss's gradient to that of the step."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Updates the weights from the summed gradients and clears them. Called by every worker.

        Returns the global L2 norm of the gradient before clipping. If it is not finite, nothing is changed.
        """

    @abstractmethod
    def discard(self) -> float:
        """Clears the step's gradients unused; returns NaN in place of their norm. Called by every worker."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Masters and optimizer moments by name, for a checkpoint: whole on the main worker, empty on the others.

        Called by every worker. The names depend neither on the number of workers nor on how the weights lie on them:
        `master.NAME`, and `optimizer.MOMENT.NAME` once a step has been taken.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` returned, from the same tensors on every worker.

        Raises:
            KeyError: a trained weight is missing.
        """

    def full(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the module as the module computes with it, under its name in the module.

        A tied weight comes once. Called, and iterated to the end, by every worker; never is the whole model gathered
        at once. A tensor is good until the next one is asked for: who keeps it must copy it.
        """
        for name, weight in named_weights(self.module):
            if weight.requires_grad or not only_trained:
                yield name, weight.detach()

    def gathered(self, *, only_trained: bool = False) -> dict[str, Tensor]:
        """What `full` gives, together and on the CPU, for a file: on the main worker; empty on the others.

        Called by every worker.
        """
        weights = {}
        for name, weight in self.full(only_trained=only_trained):
            if self.world.is_main:
                weights[name] = weight.cpu()
        return weights


class Replicated(Trained):
    """Every worker holds the whole module.

    Gradients are summed in fp32 into the masters as soon as a backward pass has finished with a weight, however many
    micro-batches make a step, and over all workers once per step.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.masters = {name: _master(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_into(self.masters[name]))  # type: ignore[no-untyped-call]
        self.optimizer = optimizer_over(list(self.masters.values()), optim)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        gradients = [self._gradient(master) for master in self.masters.values()]
        self._sum_over_workers(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if torch.isfinite(norm):
            limit = self.optim.max_grad_norm
            if 0 < limit < norm:
                torch._foreach_mul_(gradients, limit / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._publish()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def discard(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        return math.nan

    def state(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                moment, _, name = rest.partition(".")
                # The step counter of a fused optimizer lives on the device like the moments, as fp32.
                self.optimizer.state[self.masters[name]][moment] = value.to(self.masters[name].device)
        self._publish()

    def _gradient(self, master: nn.Parameter) -> Tensor:
        # A weight that no token of this worker's share touched still takes part in the all-reduce.
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def _sum_over_workers(self, gradients: list[Tensor]) -> None:
        if self.world.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.world.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the masters into the weights that compute."""
        torch._foreach_copy_(
            [weight.data for weight in self.weights.values()], [master.data for master in self.masters.values()]
        )


def shard(module: nn.Module, optim: OptimConfig, world: World) -> Trained:
    """Decides how a module is trained in this world. Nothing else knows."""
    # A head by itself is too small to be worth spreading.
    if optim.zero.stage == 0 or not any(isinstance(part, PreTrainedModel) for part in module.modules()):
        return Replicated(module, optim, world)
    from alignment.models.zero import Partitioned

    return Partitioned(module, optim, world)


def shard_frozen(module: nn.Module, optim: OptimConfig, world: World) -> nn.Module:
    """Makes a module a constant, spreads it over the workers as a trained one would be, and returns it.

    At ZeRO stage 3 its forward pass is then a collective, to be run by every worker equally often.
    """
    module.requires_grad_(False).eval()
    if optim.zero.stage < 3:
        return module
    from alignment.models.zero import partition_frozen

    return partition_frozen(module, optim, world)


def loading_device(optim: OptimConfig, world: World) -> torch.device:
    """Where a model is loaded before it is sharded: where it computes, unless it may not fit there whole."""
    return torch.device("cpu") if optim.zero.stage == 3 else world.device


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; a tied one once, under the first of its names."""
    seen: set[int] = set()
    for name, weight in module.state_dict(keep_vars=True).items():
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def optimizer_over(weights: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer."""
    if optim.name == "rmsprop":
        return torch.optim.RMSprop(weights, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


def _into(master: nn.Parameter) -> Any:
    def add(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= GRADIENT_BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
