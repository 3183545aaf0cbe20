"""Saves and restores the state of a run: a checkpoint is the folder of its model with the trainer's state beside it.

runs/NAME/checkpoints/step-00000100/
    config.json, model.safetensors, tokenizer.json …     see `alignment.models.model_folder`
    trainer/state.json, trainer/tensors.safetensors      step, cursor, fp32 masters, moments, random states
    trainer/rollouts.safetensors                         rollouts for later steps, if there are any
    manifest.json, COMMITTED                             written last, so that it is complete or absent
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import CheckpointError
from alignment.files import flush_to_disk
from alignment.identity import Identity, check_same_run, identify
from alignment.models.model_folder import STATE, TRAINER, ModelFolder
from alignment.optimizers import optimizer_kind
from alignment.settings.old_names import rename_old_keys
from alignment.settings.run import RunConfig
from alignment.stored_run import StoredRun

if TYPE_CHECKING:  # who reads the name of a file here, as the endpoint does, needs no torch
    import torch
    from torch import Tensor

    from alignment.batch import Role
    from alignment.distributed.world import World
    from alignment.models.load import LanguageModel
    from alignment.models.roles import Roles

logger = logging.getLogger(__name__)

TENSORS = f"{TRAINER}tensors.safetensors"
ROLLOUTS = f"{TRAINER}rollouts.safetensors"
PREFIXES: dict[Role, str] = {"actor": "", "critic": "critic."}
"""The prefix of each role's tensors in the trainer's state."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run between two steps."""

    step: int
    """Number of optimizer steps that are done."""
    position: int
    """Number of groups that were taken from the stream."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference in the next step."""


@dataclass(frozen=True, kw_only=True)
class ResumeState:
    """The state that a run resumes from, beside the restored models."""

    progress: Progress
    """The progress of the run."""
    rollouts: dict[str, Tensor] = field(default_factory=dict)
    """Rollouts for later steps, as the rollout queue saved them; empty if there were none."""
    adjustable: dict[str, Any] = field(default_factory=dict)
    """`Identity.adjustable_settings` of the run that wrote the checkpoint; empty for a checkpoint that has none yet."""


def save(
    config: RunConfig,
    roles: Roles,
    progress: Progress,
    *,
    identity: Identity,
    world: World,
    rollouts: dict[str, Tensor] | None = None,
    stored_run: StoredRun | None = None,
) -> None:
    """Writes a checkpoint, and deletes old ones beyond `checkpoint.keep`. Every worker must call this.

    Args:
        identity: identity of the run, which a resumed run must match.
        rollouts: rollouts for later steps.
        stored_run: the run in its storage, to which the checkpoint is uploaded while the loop goes on.

    Raises:
        CheckpointError: it cannot be written, for example because the disk is full; earlier checkpoints stay intact.
    """
    from alignment.distributed.world import run_on_main

    random_states = world.gather(_random_state(world.device))
    tensors = {f"random.{rank}": state for rank, state in enumerate(random_states)}
    for role, backend in roles.backends_by_role.items():
        tensors |= {f"{PREFIXES[role]}{name}": tensor for name, tensor in backend.state().items()}
    weights = roles.actor_backend.gather_weights(only_trained=roles.actor.has_adapter)

    def write() -> None:
        folder = config.run_folder.checkpoint(progress.step)
        if stored_run is not None and folder.exists():
            stored_run.wait()  # it may be this very folder that is being uploaded, before a roll-back
        state = {**asdict(progress), "identity": identity.fixed_settings, "adjustable": identity.adjustable_settings}
        try:
            _write(folder, roles.actor, weights, state, {TENSORS: tensors, ROLLOUTS: rollouts or {}})
        except Exception as error:  # transformers, peft, safetensors and tokenizers have errors of their own
            raise CheckpointError(f"{folder} cannot be written: {error}; earlier ones are intact") from error
        if stored_run is not None:
            stored_run.upload(folder)  # the upload before has ended then, so its folder may be deleted
        for old_folder in config.run_folder.checkpoints()[config.checkpoint.keep :]:
            shutil.rmtree(old_folder, onerror=_warn_about_deletion)

    run_on_main(write if world.is_main else None, world)


def try_saving(config: RunConfig, roles: Roles, *, world: World, stored_run: StoredRun | None = None) -> str | None:
    """Writes a checkpoint without tensors and deletes it, so that a failure shows before the first step.

    Every worker must call this.

    Args:
        stored_run: the run in its storage, which is tried too.

    Returns:
        A warning if the disk has room for one checkpoint, but not for as many as the run will keep.

    Raises:
        CheckpointError: a file cannot be written, or the disk has no room for a single checkpoint.
    """
    import torch

    from alignment.distributed.world import run_on_main

    def attempt() -> str | None:
        checkpoints_folder = config.run_folder.checkpoints_folder
        trial, actor = checkpoints_folder / ".trial", roles.actor
        try:
            (trial / TRAINER).mkdir(parents=True, exist_ok=True)
            # peft needs the names of its tensors. transformers would split the tensors of experts, so it gets none.
            names = _saved_weights(actor) if actor.has_adapter else []
            _write_model(trial, actor, {name: torch.zeros(1) for name in names})
            if actor.has_adapter:  # merging it later writes the settings of its base too
                actor.network.save_pretrained(trial, state_dict={})
            identity = identify(config, data="", num_groups=None, steps=0, source="")
            (trial / STATE).write_text(json.dumps(vars(identity)))
            if stored_run is not None:
                stored_run.try_out(trial / STATE)
            needed_bytes, free_bytes = _num_bytes(config, roles), shutil.disk_usage(trial).free
        except Exception as error:
            raise CheckpointError(
                f"{checkpoints_folder}: a checkpoint of this run cannot be written, so no step is taken: {error}"
            ) from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        return _note_of_room(config, needed_bytes, free_bytes)

    return run_on_main(attempt if world.is_main else None, world)


def restore(
    config: RunConfig, roles: Roles, *, identity: Identity, world: World, stored_run: StoredRun | None = None
) -> ResumeState:
    """Restores the newest intact checkpoint of a run, bit for bit. If there is none, the run starts at step 0.

    Args:
        stored_run: the run in its storage; a newer checkpoint than those of the run's folder is downloaded from there.

    Raises:
        CheckpointError: the checkpoint belongs to another model, algorithm or data set, or the storage does not answer.
    """
    from alignment.distributed.world import run_on_main

    find_newest = config.run_folder.newest_intact if stored_run is None else stored_run.newest_checkpoint
    folder = run_on_main(find_newest if world.is_main else None, world)
    if folder is None:
        progress = Progress(step=0, position=0, kl_coefficient=roles.algorithm.init_kl_coef)
        return ResumeState(progress=progress)
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text())
    adjustable = rename_old_keys(state.get("adjustable", {}), identity.adjustable_settings)
    fixed_settings = rename_old_keys(state["identity"], identity.fixed_settings)
    check_same_run(folder, fixed_settings, identity, adjustable.get("data", {}).get("groups"))
    tensors = load_file(folder / TENSORS)
    for role, backend in roles.backends_by_role.items():
        prefix = PREFIXES[role]
        backend.restore({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
    random_state = tensors.get(f"random.{world.rank}")
    if random_state is not None:
        _set_random_state(random_state, world.device)
    return ResumeState(
        progress=Progress(**{field.name: state[field.name] for field in fields(Progress)}),
        rollouts=load_file(folder / ROLLOUTS) if (folder / ROLLOUTS).exists() else {},
        adjustable=adjustable,
    )


def _warn_about_deletion(_: object, path: str, problem: Any) -> None:
    """Logs that a file of an old checkpoint cannot be deleted; an error handler of `shutil.rmtree`."""
    logger.warning("%s, of an older checkpoint, cannot be deleted: %s", path, problem[1])


def _note_of_room(config: RunConfig, needed_bytes: int, free_bytes: int) -> str | None:
    """A warning if the disk has room for fewer checkpoints than the run will keep.

    Args:
        needed_bytes: size of one checkpoint.
        free_bytes: room on the disk.

    Raises:
        CheckpointError: the disk has no room for a single checkpoint.
    """
    needed_gb, free_gb = needed_bytes / 1e9, free_bytes / 1e9
    figures = (
        f"{config.run_folder.checkpoints_folder}: a checkpoint of this run takes {needed_gb:.3g} GB, and "
        f"{free_gb:.3g} GB are free"
    )
    if free_bytes < needed_bytes:
        raise CheckpointError(f"{figures}. Free some, or name another place with output=…")
    # While a checkpoint is written, there is one more than the run keeps.
    num_checkpoints = config.checkpoint.keep + 1 if config.checkpoint.every else 1
    if free_bytes < needed_bytes * (num_checkpoints - len(config.run_folder.checkpoints())):
        return (
            f"WARNING: {figures}, while the run will need {num_checkpoints} at once (checkpoint.keep, and one being "
            "written)"
        )
    return None


def _num_bytes(config: RunConfig, roles: Roles) -> int:
    """The size of a checkpoint: the model in its own format, and fp32 masters and moments of all trained weights."""
    model_bytes = sum(_numel(tensor) * tensor.element_size() for tensor in _saved_weights(roles.actor).values())
    modules = [num_trained.module for num_trained in roles.backends_by_role.values()]
    num_trained = sum(_numel(weight) for module in modules for weight in module.parameters() if weight.requires_grad)
    moments = optimizer_kind(config.optim.name).moments
    num_moments = 2 if moments is None else len(moments)  # most optimizers remember two numbers of a weight at most
    return model_bytes + 4 * (1 + num_moments) * num_trained


def _numel(weight: Any) -> int:
    """The number of elements of a full weight, even if ZeRO-3 has sharded it."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _saved_weights(actor: LanguageModel) -> dict[str, Tensor]:
    """The weights that a checkpoint keeps of a model, by name; at ZeRO-3 they have no content."""
    from alignment.distributed.trainable import named_weights

    return {
        name: weight for name, weight in named_weights(actor.module) if weight.requires_grad or not actor.has_adapter
    }


def _write(
    folder: Path,
    actor: LanguageModel,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
) -> None:
    """Writes a checkpoint to a temporary folder, commits it, and renames the folder, so that it appears atomically.

    Args:
        tensors: tensors by the name of their file; a file without tensors is not written.
    """
    from safetensors.torch import save_file

    temporary_folder = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary_folder, ignore_errors=True)
    try:
        (temporary_folder / TRAINER).mkdir(parents=True)
        _write_model(temporary_folder, actor, weights)
        (temporary_folder / STATE).write_text(json.dumps(state, indent=1))
        for file, content in tensors.items():
            if content:
                cpu_tensors = {name: tensor.cpu().contiguous() for name, tensor in content.items()}
                save_file(cpu_tensors, temporary_folder / file)
        ModelFolder(temporary_folder).commit()
        shutil.rmtree(folder, ignore_errors=True)
        temporary_folder.rename(folder)
        flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(temporary_folder, ignore_errors=True)
        raise


def _write_model(folder: Path, actor: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Writes the files that other programs open: settings, weights and tokenizer."""
    actor.module.save_pretrained(folder, state_dict=weights)
    if not actor.network.can_generate():
        actor.network.config.save_pretrained(folder)  # peft does not write it for the adapter of a reward model
    actor.tokenizer.save_pretrained(folder)


def _random_state(device: torch.device) -> Tensor:
    """The state of torch's random generator on a device."""
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    """Restores the state of torch's random generator on a device."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
