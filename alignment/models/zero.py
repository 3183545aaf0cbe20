"""DeepSpeed's ZeRO behind `parallel.shard`: of a model's moments, gradients and weights a worker holds only its share.

Nothing outside this module knows DeepSpeed. Forward passes call decoder and head by themselves, not DeepSpeed's engine,
so what the engine's own forward pass would prepare is done in `Partitioned.backward` and in `_Gathering`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from alignment.models.parallel import GRADIENT_BUCKET, Trained, World, named_weights, optimizer_over
from alignment.settings.run import OptimConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}
"""Optimizer state of the shape of a weight, by the optimizer's name."""


class Partitioned(Trained):
    """A module whose fp32 masters and moments (stage 1), gradients (2) and weights (3) lie in shares on the workers."""

    lockstep = True

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.optimizer = optimizer_over(list(self.weights.values()), optim)
        self.engine = _start_engine(module, optim, world, self.optimizer)
        self.gathering = _Gathering(module, self.engine) if optim.zero.stage == 3 else None
        self.num_updates = 0
        if self.gathering:
            # Stage 3 only knows the mean over the workers. The loss cannot be scaled: other modules may share it.
            for weight in self.weights.values():
                weight.register_hook(lambda gradient: gradient * world.size)  # type: ignore[no-untyped-call]

    def backward(self, loss: Tensor) -> None:
        self.engine.optimizer.clear_backward_seen_flag()
        self.engine._backward_prologue()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.gathering:
            self.gathering.hold()
        if not self.engine.was_step_applied():
            return math.inf
        self.num_updates += 1
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> float:
        optimizer = self.engine.optimizer
        optimizer.zero_grad()
        if self._accumulates_separately():
            optimizer.micro_step_id = -1
            optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
            optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))
            if self.optim.zero.offload_optimizer:
                optimizer.reset_cpu_buffers()
        return math.nan

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        moments = MOMENTS[self.optim.name] if self.num_updates else ()
        for name, weight in self.weights.items():
            full_tensors = {f"master.{name}": safe_get_full_fp32_param(weight)}
            for moment in moments:
                full_tensors[f"optimizer.{moment}.{name}"] = safe_get_full_optimizer_state(weight, moment)
            if self.num_updates:
                full_tensors[f"optimizer.step.{name}"] = torch.tensor(float(self.num_updates))
            if self.world.is_main:
                tensors.update((key, value.cpu()) for key, value in full_tensors.items())
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        steps = {int(value) for key, value in tensors.items() if key.startswith("optimizer.step.")}
        self.num_updates = max(steps, default=0)
        if self.num_updates:
            self._prepare_moments()
        for name, weight in self.weights.items():
            self._restore_weight(weight, tensors[f"master.{name}"])
            for moment in MOMENTS[self.optim.name] if self.num_updates else ():
                self._restore_moment(weight, moment, tensors[f"optimizer.{moment}.{name}"])
        if self.gathering:
            self.engine.empty_partition_cache()  # what is whole just now, is as it was before
            self.gathering.hold()
        else:
            self.engine.optimizer.update_lp_params()

    def full(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        if not self.gathering:
            yield from super().full(only_trained=only_trained)
            return
        for name, weight in named_weights(self.module):
            if weight.requires_grad or not only_trained:
                with self.gathering.whole(weight):
                    yield name, weight.detach()

    def _accumulates_separately(self) -> bool:
        """Whether the optimizer keeps the sum of the micro-batches' gradients where `zero_grad` does not look."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return isinstance(self.engine.optimizer, DeepSpeedZeroOptimizer)

    def _restore_weight(self, weight: nn.Parameter, full_tensor: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.gathering:
            share = self.gathering.share(weight, full_tensor, self.world)
            safe_set_local_fp32_param(weight, share)
            weight.ds_tensor.data.copy_(share)  # type: ignore[attr-defined]
        else:
            safe_set_full_fp32_param(weight, full_tensor)

    def _restore_moment(self, weight: nn.Parameter, moment: str, full_tensor: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.gathering:
            safe_set_local_optimizer_state(weight, self.gathering.share(weight, full_tensor, self.world), moment)
        else:
            safe_set_full_optimizer_state(weight, full_tensor, moment)

    def _prepare_moments(self) -> None:
        """Makes the moments that the first step would make, to be filled, and sets their counters."""
        for share in self._master_shares():
            state = self.optimizer.state[share]
            for moment in MOMENTS[self.optim.name]:
                state.setdefault(moment, torch.zeros_like(share))
            state["step"] = torch.tensor(float(self.num_updates), device=share.device)
        if not self.gathering:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _master_shares(self) -> list[Tensor]:
        """This worker's flat shares of the masters, to which the optimizer's state belongs."""
        if self.gathering:  # stage 3 hands them to the optimizer one after the other, and only while it updates
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [share for group in self.optimizer.param_groups for share in group["params"]]


def partition_frozen(module: nn.Module, optim: OptimConfig, world: World) -> nn.Module:
    """Leaves a worker its share of a frozen module's weights, from which forward passes gather layer by layer."""
    _Gathering(module, _start_engine(module, optim, world, None))
    return module


class _Gathering:
    """What stage 3 needs around decoder and head: where a pass begins, and a head that can be read from outside.

    The output head is not called but read, by a function that chunks over tokens and reads it again in its backward
    pass. It therefore stays whole on every worker. At the peak of a pass it would have to be whole anyway.
    """

    def __init__(self, module: nn.Module, engine: Any) -> None:
        network = next(submodule for submodule in module.modules() if isinstance(submodule, PreTrainedModel))
        head = network.get_output_embeddings()
        self.held: list[Any] = [] if head is None else list(head.parameters(recurse=False))
        for weight in self.held:
            # Either mark alone is overlooked: while DeepSpeed records the order of modules, and once it knows it.
            weight.ds_persist = weight.is_external_param = True
        self.hold()

        def begin(*_: Any) -> None:
            # The engine lives as long as this hook: when it goes, it takes its own hooks along.
            offload = engine.optimizer if engine.basic_optimizer is None else engine.optimizer.parameter_offload
            offload.get_param_coordinator().reset_step()

        # Before DeepSpeed's own hook of the decoder, which would still count it to the pass before.
        network.get_decoder().register_forward_pre_hook(begin, prepend=True)

    def hold(self) -> None:
        """Makes the head whole again after every weight was given back to its owners."""
        for weight in self.held:
            weight.all_gather()

    def whole(self, weight: Any) -> Any:
        """A context in which a weight is whole; a collective."""
        from deepspeed.runtime.zero import GatheredParameters

        is_partitioned = isinstance(weight, nn.Parameter) and not any(
            weight is head_weight for head_weight in self.held
        )
        return GatheredParameters([weight] if is_partitioned else [])

    def share(self, weight: Any, full_tensor: Tensor, world: World) -> Tensor:
        """This worker's share of a tensor of the weight's shape, flat and padded with zeros as DeepSpeed cuts it."""
        size = weight.ds_tensor.numel()
        return pad(full_tensor.flatten(), (0, size * world.size - full_tensor.numel()))[world.rank * size :][:size]


def _start_engine(module: nn.Module, optim: OptimConfig, world: World, optimizer: torch.optim.Optimizer | None) -> Any:
    # Read when DeepSpeed is imported; a worker without a GPU may sit on a machine that has some.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # DeepSpeed takes its device from here. The launcher's number is wrong where each worker sees its own GPU only.
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = _engine_settings(module, optim, world)
    _use_one_dtype(module, next(module.parameters()).dtype)
    if world.device.type == "cpu":
        # DeepSpeed would compile a sum over workers that only its tensor-parallel inference uses, for 40 s, under a
        # lock that is a file. The file of a build that was killed stays, and every later run would wait for ever.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what belongs into a log
        deepspeed.init_distributed(dist_init_required=False)
        if optim.zero.stage == 3:
            _partition_weights(module, settings, world)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _partition_weights(module: nn.Module, settings: dict[str, Any], world: World) -> None:
    """Cuts weight after weight into the workers' shares, from wherever the module lies: it may not fit on one GPU."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(world.device)


def _use_one_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """DeepSpeed keeps a module's weights in one number format; layers that were kept in fp32 still compute in it."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32 != dtype:
            layer.to(dtype).forward = functools.partial(_linear_in_fp32, layer)  # type: ignore[method-assign]


def _linear_in_fp32(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def _engine_settings(module: nn.Module, optim: OptimConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own configuration: sums of fp32 gradients, updated whenever `step` is called."""
    is_bf16 = next(module.parameters()).dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean" if optim.zero.stage == 3 else "sum",
        "gradient_clipping": optim.max_grad_norm,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_settings(module, optim, world),
    }


def _zero_settings(module: nn.Module, optim: OptimConfig, world: World) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": optim.zero.stage, "reduce_bucket_size": GRADIENT_BUCKET}
    on_cpu = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if optim.zero.offload_optimizer:
        settings["offload_optimizer"] = on_cpu
    if optim.zero.offload_parameters:
        settings["offload_param"] = on_cpu
    if optim.zero.stage == 3:
        size = sum(weight.numel() for weight in module.parameters())
        # DeepSpeed's own figures are the upper ends: with those alone a small model would never be spread at all.
        settings["stage3_param_persistence_threshold"] = min(100_000, size // 1000)
        settings["stage3_max_reuse_distance"] = min(1_000_000_000, size // 8)
    return settings
