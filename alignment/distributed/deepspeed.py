"""The DeepSpeed backend: ZeRO shards moments, gradients and weights over the workers.

No other module knows DeepSpeed. Forward passes call the root module and not DeepSpeed's engine around it. So
`DeepSpeedBackend.backward` does what the engine's own forward pass would prepare.
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

from alignment.distributed.trainable import GRADIENT_BUCKET, TrainableModule, named_weights, optimizer_over
from alignment.distributed.world import World
from alignment.optimizers import sharded_moments
from alignment.settings.run import OptimConfig


class DeepSpeedBackend(TrainableModule):
    """Trains a module whose fp32 masters and moments (stage 1), gradients (2) and weights (3) are sharded."""

    needs_lockstep = True

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World, *, root: nn.Module) -> None:
        """Args:
        module: the module whose weights are trained.
        root: the module that forward passes call, which holds `module`.
        """
        self.module = module
        self.optim = optim
        self.world = world
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.moments = sharded_moments(optim.name)
        self.optimizer = optimizer_over(list(self.weights.values()), optim)
        self.engine = _start_engine(root, optim, world, self.optimizer)
        self.shards_weights = optim.zero.stage == 3
        self.num_updates = 0
        if self.shards_weights:
            # Stage 3 averages gradients over the workers. The loss cannot be scaled, as other modules may share it.
            for weight in self.weights.values():
                weight.register_hook(lambda gradient: gradient * world.size)  # type: ignore[no-untyped-call]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the sharded gradient of the step."""
        self.engine.optimizer.clear_backward_seen_flag()
        self.engine._backward_prologue()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Lets DeepSpeed sum, clip and apply the gradients; inf if they are not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():
            return math.inf
        self.num_updates += 1
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> float:
        """Clears all of DeepSpeed's gradient buffers."""
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
        """Master weights and moments by name, gathered weight by weight on the main worker."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        moments = self.moments if self.num_updates else ()
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
        """Cuts full tensors into shards, and restores this worker's."""
        steps = {int(value) for key, value in tensors.items() if key.startswith("optimizer.step.")}
        self.num_updates = max(steps, default=0)
        if self.num_updates:
            self._prepare_moments()
        for name, weight in self.weights.items():
            self._restore_weight(weight, tensors[f"master.{name}"])
            for moment in self.moments if self.num_updates else ():
                self._restore_moment(weight, moment, tensors[f"optimizer.{moment}.{name}"])
        if self.shards_weights:
            self.engine.empty_partition_cache()  # weights that are gathered at this time still hold old values
        else:
            self.engine.optimizer.update_lp_params()

    def named_weights(self, *, only_trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight by name; at stage 3, it gathers them one at a time."""
        if not self.shards_weights:
            yield from super().named_weights(only_trained=only_trained)
            return
        from deepspeed.runtime.zero import GatheredParameters

        for name, weight in named_weights(self.module):
            if weight.requires_grad or not only_trained:
                with GatheredParameters([weight] if isinstance(weight, nn.Parameter) else []):
                    yield name, weight.detach()

    def _accumulates_separately(self) -> bool:
        """Whether the optimizer sums gradients of micro-batches in buffers that `zero_grad` does not clear."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return isinstance(self.engine.optimizer, DeepSpeedZeroOptimizer)

    def _restore_weight(self, weight: nn.Parameter, full_tensor: Tensor) -> None:
        """Writes a weight and its master, or this worker's share of them."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.shards_weights:
            share = self._share(weight, full_tensor)
            safe_set_local_fp32_param(weight, share)
            weight.ds_tensor.data.copy_(share)  # type: ignore[attr-defined]
        else:
            safe_set_full_fp32_param(weight, full_tensor)

    def _restore_moment(self, weight: nn.Parameter, moment: str, full_tensor: Tensor) -> None:
        """Writes an optimizer moment, or this worker's share of it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.shards_weights:
            safe_set_local_optimizer_state(weight, self._share(weight, full_tensor), moment)
        else:
            safe_set_full_optimizer_state(weight, full_tensor, moment)

    def _prepare_moments(self) -> None:
        """Creates the empty moments that the first step would create, and sets their step counters."""
        for share in self._master_shares():
            state = self.optimizer.state[share]
            for moment in self.moments:
                state.setdefault(moment, torch.zeros_like(share))
            state["step"] = torch.tensor(float(self.num_updates), device=share.device)
        if not self.shards_weights:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _master_shares(self) -> list[Tensor]:
        """This worker's flat shares of the master weights, which are the keys of the optimizer's state."""
        if self.shards_weights:  # stage 3 hands them to the optimizer one at a time, and only during an update
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [share for group in self.optimizer.param_groups for share in group["params"]]

    def _share(self, weight: Any, full_tensor: Tensor) -> Tensor:
        """This worker's flat share of a tensor of the weight's shape, padded with zeros as DeepSpeed does it."""
        size = weight.ds_tensor.numel()
        padded = pad(full_tensor.flatten(), (0, size * self.world.size - full_tensor.numel()))
        return padded[self.world.rank * size :][:size]


def partition_frozen(root: nn.Module, optim: OptimConfig, world: World) -> None:
    """Shards the weights of a frozen module; a forward pass gathers them layer by layer."""
    engine = _start_engine(root, optim, world, None)
    # A deleted engine would remove its hooks. It must not become a submodule, because it holds the root itself.
    vars(root)["deepspeed_engine"] = engine


def _start_engine(root: nn.Module, optim: OptimConfig, world: World, optimizer: torch.optim.Optimizer | None) -> Any:
    """Makes DeepSpeed's engine over a root module; without an optimizer for a frozen one."""
    # DeepSpeed reads this when it is imported. A worker on the CPU may run on a machine that has GPUs.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # DeepSpeed takes its device from here. The launcher's number is wrong if each worker sees only its own GPU.
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = _engine_settings(root, optim, world)
    _use_one_dtype(root, next(root.parameters()).dtype)
    if world.device.type == "cpu":
        # DeepSpeed would spend 40 s to compile a sum over workers that only its tensor-parallel inference uses. It
        # locks that build with a file. If a build is killed, the file stays, and every later run would wait forever.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints messages that belong in a log
        deepspeed.init_distributed(dist_init_required=False)
        if optim.zero.stage == 3:
            _partition_weights(root, settings, world)
        engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=settings, dist_init_required=False)
    if optim.zero.stage == 3:
        _start_passes_of_network(root, engine)
    return engine


def _start_passes_of_network(root: nn.Module, engine: Any) -> None:
    """Tells stage 3 where a pass begins if the network is called by itself and not through the root, to generate."""
    network = next(submodule for submodule in root.modules() if isinstance(submodule, PreTrainedModel))

    def reset_pass(*_: Any) -> None:
        offload = engine.optimizer if engine.basic_optimizer is None else engine.optimizer.parameter_offload
        offload.get_param_coordinator().reset_step()

    # It must run before DeepSpeed's own hook, which would count the network as a part of the previous pass.
    network.register_forward_pre_hook(reset_pass, prepend=True)


def _partition_weights(module: nn.Module, settings: dict[str, Any], world: World) -> None:
    """Shards a module weight by weight. The module may lie on the CPU, because it may not fit on one GPU."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(world.device)


def _use_one_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives all linear layers one number format, as DeepSpeed requires. Layers that were in fp32 still compute so."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32 != dtype:
            layer.to(dtype).forward = functools.partial(_linear_in_fp32, layer)  # type: ignore[method-assign]


def _linear_in_fp32(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """The forward pass of a linear layer, computed in fp32."""
    return linear(inputs.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def _engine_settings(module: nn.Module, optim: OptimConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration: gradients are summed in fp32, and every call of `step` updates the weights."""
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
    """The section `zero_optimization` of DeepSpeed's configuration."""
    settings: dict[str, Any] = {"stage": optim.zero.stage, "reduce_bucket_size": GRADIENT_BUCKET}
    on_cpu = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if optim.zero.offload_optimizer:
        settings["offload_optimizer"] = on_cpu
    if optim.zero.offload_parameters:
        settings["offload_param"] = on_cpu
    if optim.zero.stage == 3:
        size = sum(weight.numel() for weight in module.parameters())
        # DeepSpeed's defaults are the upper limits. With these alone, a small model would not be sharded at all.
        settings["stage3_param_persistence_threshold"] = min(100_000, size // 1000)
        settings["stage3_max_reuse_distance"] = min(1_000_000_000, size // 8)
    return settings
