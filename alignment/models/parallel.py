"""One worker or many: the World of a training loop, and the port of a module that trains, with a replicated backend."""

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

from alignment.errors import AlignmentError
from alignment.settings.run import OptimConfig

Item = TypeVar("Item")
GRADIENT_BUCKET = 1 << 24
"""Number of gradient elements in one all-reduce (64 MiB in fp32)."""
ROUND_S = 30.0
"""Longest time that workers wait in one collective while only the main worker is working."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A worker's position among all workers. For a single worker, every collective is the identity."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that this worker computes on."""

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, item: Item) -> Item:
        """Sends the main worker's item to every worker, and returns it."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, item: Item) -> list[Item]:
        """Collects one item from each worker; returns all of them, by rank, on every worker."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Waits until every worker has called this."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Closes this worker's connections after an error, so that the others' collectives fail instead of waiting.

        This is for gloo only. NCCL would wait for the collectives in progress. With NCCL the launcher, such as Ray
        Train or torchrun, ends all processes when one has failed.
        """
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def run_on_main(work: Callable[[], Item] | None, world: World) -> Item:
    """Runs `work` on the main worker, and returns its result on every worker.

    An AlignmentError that it raises is raised on every worker, so that no worker waits for another. `work` runs in a
    thread and must not use collectives. However long it takes, no collective waits longer than `ROUND_S`.

    Args:
        work: None on the other workers.
    """
    if world.size == 1:
        assert work is not None
        return work()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work) if work is not None else None
        while not world.from_main(future is not None and bool(wait([future], ROUND_S).done)):
            pass
    result: Item | None = None
    error: AlignmentError | None = None
    if future is not None:
        try:
            result = future.result()
        except AlignmentError as failure:
            error = failure
    result, error = world.from_main((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def run_on_all(work: Callable[[], Item], world: World) -> Item:
    """Runs `work` on every worker, and returns each worker's own result.

    An AlignmentError that one worker raises is raised on every worker, so that no worker waits for another.
    """
    result: Item | None = None
    error: AlignmentError | None = None
    try:
        result = work()
    except AlignmentError as failure:
        error = failure
    for problem in world.gather(error):
        if problem is not None:
            raise problem
    return result  # type: ignore[return-value]


class TrainableModule(ABC):
    """A module in training: its weights, fp32 master copies of the trained ones, and the optimizer over them.

    Gradients are summed over micro-batches and over workers and never averaged. So a loss must already be divided by
    global counts.
    """

    module: nn.Module
    """The module that forward passes use."""
    world: World
    """The workers that train it together."""
    needs_lockstep = False
    """True if forward and backward passes are collectives, so that every worker must run the same number of them."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the gradient of the step."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Updates the weights with the summed gradients, and clears the gradients. Every worker must call this.

        Returns:
            The global L2 norm of the gradient before clipping. If it is not finite, no weight is changed.
        """

    @abstractmethod
    def discard(self) -> float:
        """Clears the gradients of the step without using them; returns NaN. Every worker must call this."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Master weights and optimizer moments by name, for a checkpoint: all on the main worker, none on the others.

        Every worker must call this. The names are `master.NAME` and, after the first step, `optimizer.MOMENT.NAME`.
        They do not depend on the number of workers or on how the weights are spread over them.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned. Every worker must call this with the same tensors.

        Raises:
            KeyError: a trained weight is missing.
        """

    def named_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight of the module by name, in the number format in which the module computes.

        A tied weight comes once. Every worker must call this and iterate to the end. Sharded weights are gathered one
        at a time, so a tensor is valid only until the next one is taken, and must be copied to be kept.
        """
        for name, weight in named_weights(self.module):
            if weight.requires_grad or not only_trained:
                yield name, weight.detach()

    def gather_weights(self, *, only_trained: bool = False) -> dict[str, Tensor]:
        """Collects all weights that `full` yields on the CPU of the main worker; empty on the others.

        Every worker must call this.
        """
        weights = {}
        for name, weight in self.named_weights(only_trained=only_trained):
            if self.world.is_main:
                weights[name] = weight.cpu()
        return weights


class ReplicatedBackend(TrainableModule):
    """Data parallelism in which every worker holds the full module.

    The gradient of each micro-batch is added in fp32 to the master weight's gradient as soon as the backward pass has
    computed it. The sums are then added up over the workers once per step.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.masters = {name: _master(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_accumulate_into(self.masters[name]))  # type: ignore[no-untyped-call]
        self.optimizer = optimizer_over(list(self.masters.values()), optim)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the master weights' gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """Sums and clips the gradients, updates the master weights, and copies them into the module."""
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
        """Clears the gradients of the step without using them."""
        self.optimizer.zero_grad(set_to_none=True)
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """Master weights and optimizer moments by name, on the main worker."""
        if not self.world.is_main:
            return {}
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores master weights and moments, and copies the masters into the module."""
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
        # A weight that no token of this worker used still takes part in the all-reduce.
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def _sum_over_workers(self, gradients: list[Tensor]) -> None:
        if self.world.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.world.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            chunks = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, chunk in zip(bucket, chunks, strict=True):
                gradient.copy_(chunk.view_as(gradient))

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies the master weights into the weights that the module computes with."""
        torch._foreach_copy_(
            [weight.data for weight in self.weights.values()], [master.data for master in self.masters.values()]
        )


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name. A tied one comes once, under the first of its names."""
    seen_ids: set[int] = set()
    for name, weight in module.state_dict(keep_vars=True).items():
        if id(weight) not in seen_ids:
            seen_ids.add(id(weight))
            yield name, weight


def optimizer_over(weights: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """Makes the configured optimizer over some weights."""
    if optim.name == "rmsprop":
        return torch.optim.RMSprop(weights, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def _master(weight: nn.Parameter) -> nn.Parameter:
    """The fp32 master copy of a weight; the weight itself if it is fp32 already."""
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


def _accumulate_into(master: nn.Parameter) -> Any:
    """Returns a hook that moves a weight's gradient into its master weight's gradient."""

    def add(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Groups tensors into buckets of about GRADIENT_BUCKET elements."""
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
