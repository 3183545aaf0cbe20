"""Checkpoints: Hugging Face folders plus trainer state, whole or absent, and proved by their hashes before use.

runs/NAME/checkpoints/step-00000100/
    config.json, model.safetensors, tokenizer.json …     opened by transformers, peft and vLLM as it is
    trainer/state.json, trainer/tensors.safetensors      step, cursor, fp32 masters, moments, random states
    trainer/rollouts.safetensors                         answers drawn ahead of their step, if there are any
    manifest.json                                        sha256 and size of every file
    COMMITTED                                            sha256 of the manifest; written last
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import CheckpointError
from alignment.identity import Identity, check_same_run, identify
from alignment.settings.run import RunConfig

if TYPE_CHECKING:  # who only looks for a checkpoint, as the endpoint does, need not wait for torch
    import torch
    from torch import Tensor

    from alignment.batch import Role
    from alignment.models.load import LanguageModel
    from alignment.models.parallel import World
    from alignment.models.roles import Roles

logger = logging.getLogger(__name__)

MANIFEST, COMMITTED, CHECKPOINTS = "manifest.json", "COMMITTED", "checkpoints"
TRAINER = "trainer/"
STATE, TENSORS = f"{TRAINER}state.json", f"{TRAINER}tensors.safetensors"
ROLLOUTS = f"{TRAINER}rollouts.safetensors"
PREFIXES: dict[Role, str] = {"actor": "", "critic": "critic."}
"""Of each trained role's tensors."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands between two steps."""

    step: int
    """Optimizer steps done."""
    position: int
    """Groups taken from the stream."""
    kl_coefficient: float = 0.0
    """Price of a nat of divergence from the reference, in the next step."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint has put back, beside the models."""

    progress: Progress
    rollouts: dict[str, Tensor] = field(default_factory=dict)
    """What the run's feed had drawn ahead; empty if nothing."""
    adjustable: dict[str, Any] = field(default_factory=dict)
    """`Identity.adjustable` of the run that wrote it; empty if it was written before these were kept."""


def save(
    config: RunConfig,
    roles: Roles,
    progress: Progress,
    *,
    identity: Identity,
    world: World,
    rollouts: dict[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint beside the others and deletes those that `keep` no longer covers. Called by every worker.

    Args:
        identity: of the run, which a resumed run must match.
        rollouts: what its feed has drawn ahead.

    Raises:
        CheckpointError: it cannot be written, as when the disk is full; earlier checkpoints stay as they are.
    """
    from alignment.models.parallel import on_every_worker

    random_states = world.gather(_random_state(world.device))
    tensors = {f"random.{rank}": state for rank, state in enumerate(random_states)}
    for role, trained in roles.backends_by_role.items():
        tensors |= {f"{PREFIXES[role]}{name}": tensor for name, tensor in trained.state().items()}
    weights = roles.actor_backend.gather_weights(only_trained=roles.actor.has_adapter)

    def write() -> None:
        folder = checkpoints_of(config.folder) / f"step-{progress.step:08d}"
        state = {**asdict(progress), "identity": identity.fixed, "adjustable": identity.adjustable}
        try:
            _write(folder, roles.actor, weights, state, {TENSORS: tensors, ROLLOUTS: rollouts or {}})
        except Exception as error:  # of transformers, peft, safetensors, tokenizers: each has errors of its own
            raise CheckpointError(f"{folder} cannot be written: {error}; earlier ones are intact") from error
        for old in _folders(config.folder)[config.checkpoint.keep :]:
            shutil.rmtree(old, onerror=_warn_of_an_old_one)

    on_every_worker(write if world.is_main else None, world)


def try_saving(config: RunConfig, roles: Roles, *, world: World) -> str | None:
    """Writes a checkpoint without its tensors, by the same writers, and deletes it again. Called by every worker.

    So what cannot be saved is known before the first step, and not after the last one.

    Returns a note for people if there is room for a checkpoint, but not for as many as there will be.

    Raises:
        CheckpointError: a file cannot be written, or the disk has no room for a single checkpoint.
    """
    import torch

    from alignment.models.parallel import on_every_worker

    def attempt() -> str | None:
        place = checkpoints_of(config.folder)
        trial, actor = place / ".trial", roles.actor
        try:
            (trial / TRAINER).mkdir(parents=True, exist_ok=True)
            # peft looks for its names; transformers would take the content of a mixture's experts apart.
            names = _saved(actor) if actor.has_adapter else []
            _write_model(trial, actor, {name: torch.zeros(1) for name in names})
            if actor.has_adapter:  # who merges it later writes its base's settings too
                actor.network.save_pretrained(trial, state_dict={})
            identity = identify(config, data="", num_groups=None, steps=0, source="")
            (trial / STATE).write_text(json.dumps(vars(identity)))
            needed, free = _num_bytes(config, roles), shutil.disk_usage(trial).free
        except Exception as error:
            raise CheckpointError(
                f"{place}: a checkpoint of this run cannot be written, so no step is taken: {error}"
            ) from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        return _note_of_room(config, needed, free)

    return on_every_worker(attempt if world.is_main else None, world)


def restore(config: RunConfig, roles: Roles, *, identity: Identity, world: World) -> Restored:
    """Puts the newest intact checkpoint of the run back, bit for bit; step 0 if there is none.

    Raises:
        CheckpointError: the checkpoint belongs to another model, algorithm or data set.
    """
    folder = world.from_main(newest_intact(config.folder) if world.is_main else None)
    if folder is None:
        first = Progress(step=0, position=0, kl_coefficient=roles.algorithm.first_kl_coefficient)
        return Restored(progress=first)
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text())
    adjustable = state.get("adjustable", {})
    check_same_run(folder, state["identity"], identity, adjustable.get("data", {}).get("groups"))
    tensors = load_file(folder / TENSORS)
    for role, trained in roles.backends_by_role.items():
        prefix = PREFIXES[role]
        trained.restore({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
    mine = tensors.get(f"random.{world.rank}")
    if mine is not None:
        _set_random_state(mine, world.device)
    return Restored(
        progress=Progress(**{field.name: state[field.name] for field in fields(Progress)}),
        rollouts=load_file(folder / ROLLOUTS) if (folder / ROLLOUTS).exists() else {},
        adjustable=adjustable,
    )


def find_checkpoint(path: Path, *, only_model: bool = False) -> Path:
    """The verified checkpoint that a path means: itself, or the newest intact one of a run's folder.

    Args:
        only_model: as in `verify`.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if (path / MANIFEST).is_file() or (path / COMMITTED).is_file():
        verify(path, only_model=only_model)
        return path
    newest = newest_intact(path, only_model=only_model)
    if newest is None:
        none_yet = ": this run has none (yet)" if is_run(path) else ""
        raise CheckpointError(f"{path} is neither a checkpoint nor the folder of a run with an intact one{none_yet}")
    return newest


def checkpoint_or_path(path: str) -> str:
    """For the folder of a run or checkpoint of ours the verified checkpoint that it means, else the path as it stands.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none.
    """
    folder = Path(path).expanduser()
    if folder.name == CHECKPOINTS and is_run(folder.parent):
        folder = folder.parent
    is_ours = is_run(folder) or any((folder / mark).is_file() for mark in (COMMITTED, MANIFEST))
    return str(find_checkpoint(folder, only_model=True)) if is_ours else path


def is_run(folder: Path) -> bool:
    """True for the folder of a run, also before its first checkpoint; false for that of a model."""
    settings = _settings(folder / "config.json")
    if "model_type" in settings:
        return False
    return {"algorithm", "data"} <= settings.keys() or checkpoints_of(folder).is_dir()


def newest_intact(run: Path, *, only_model: bool = False) -> Path | None:
    """The newest checkpoint of a run that proves to be whole; damaged newer ones are moved to `quarantine`."""
    for folder in _folders(run):
        try:
            verify(folder, only_model=only_model)
            return folder
        except CheckpointError as error:
            logger.warning("%s; %s, trying the one before", error, _set_aside(folder, run / "quarantine"))
    return None


def _set_aside(folder: Path, quarantine: Path) -> str:
    """Moves a damaged checkpoint out of the way, and says what was done: a run of somebody else's may be read-only."""
    aside = quarantine / folder.name
    try:
        quarantine.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    except OSError as error:
        return f"it cannot be moved to {aside} ({error.strerror})"
    return f"moved to {aside}"


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if there is none."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def verify(folder: Path, *, only_model: bool = False) -> None:
    """Compares every file with the manifest, and the manifest with the commit mark.

    Args:
        only_model: whether the model alone is wanted; then the trainer's state, several times as large, is not read.

    Raises:
        CheckpointError: something is missing or differs; the text names the file.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
        committed = (folder / COMMITTED).read_text()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {Path(error.filename).name} is missing") from error
    if hashlib.sha256(manifest).hexdigest() != committed.strip():
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} is not the one that was committed")
    for name, known in json.loads(manifest).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if file.stat().st_size != known["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {file.stat().st_size} bytes instead of {known['bytes']}"
            )
        if only_model and name.startswith(TRAINER):
            continue
        if (_digest(file) if only_model else _sha256(file)) != known["sha256"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: the content of {name} has changed")


def commit(folder: Path) -> str:
    """Writes the manifest of a folder's files and the mark that it is whole, and brings all of it onto the disk.

    Returns:
        sha256 of the manifest, in hex; the same for folders with the same files.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    known = {str(file.relative_to(folder)): {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in files}
    manifest = json.dumps(known, indent=1)
    mark = hashlib.sha256(manifest.encode()).hexdigest()
    (folder / MANIFEST).write_text(manifest)
    (folder / COMMITTED).write_text(mark)
    for place in [*folder.rglob("*"), folder]:
        if place.is_dir() or place.stat().st_nlink == 1:  # a file that lies elsewhere too keeps its mode
            place.chmod(0o755 if place.is_dir() else 0o644)  # the endpoint may run as another user
        to_disk(place)
    return mark


def to_disk(place: Path) -> None:
    """Waits until a file or folder is on the disk, and not only in the system's memory."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_of(run: Path) -> Path:
    """The folder in which a run keeps its checkpoints."""
    return run / CHECKPOINTS


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(checkpoints_of(run).glob("step-*"), reverse=True)


def _warn_of_an_old_one(_: object, path: str, problem: Any) -> None:
    logger.warning("%s, of an older checkpoint, cannot be deleted: %s", path, problem[1])


def _note_of_room(config: RunConfig, needed: int, free: int) -> str | None:
    """A warning if the disk has room for fewer checkpoints than there will be.

    Args:
        needed: bytes of one checkpoint.
        free: bytes that the disk has room for.

    Raises:
        CheckpointError: it has room for none.
    """
    place = checkpoints_of(config.folder)
    figures = f"{place}: a checkpoint of this run takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
    if free < needed:
        raise CheckpointError(f"{figures}. Free some, or name another place with output=…")
    # One more than are kept exists while it is written.
    wanted = config.checkpoint.keep + 1 if config.checkpoint.every else 1
    if free < needed * (wanted - len(_folders(config.folder))):
        return f"WARNING: {figures}, while the run will need {wanted} at once (checkpoint.keep, and one being written)"
    return None


def _num_bytes(config: RunConfig, roles: Roles) -> int:
    """Size of a checkpoint: the model as it computes, and fp32 masters and moments of all that is trained."""
    model = sum(_numel(tensor) * tensor.element_size() for tensor in _saved(roles.actor).values())
    modules = [trained.module for trained in roles.backends_by_role.values()]
    trained = sum(_numel(weight) for module in modules for weight in module.parameters() if weight.requires_grad)
    num_moments = {"adamw": 2, "rmsprop": 1}[config.optim.name]
    return model + 4 * (1 + num_moments) * trained


def _numel(weight: Any) -> int:
    """Elements of a weight, also where ZeRO-3 has left this worker only a share of it."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _saved(actor: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint keeps of a model, by name; at ZeRO-3 without the content."""
    from alignment.models.parallel import named_weights

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
    """Writes beside the final place, commits, and renames: a checkpoint appears whole or not at all.

    Args:
        tensors: by the name of their file; none is written without.
    """
    from safetensors.torch import save_file

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / TRAINER).mkdir(parents=True)
        _write_model(unfinished, actor, weights)
        (unfinished / STATE).write_text(json.dumps(state, indent=1))
        for file, content in tensors.items():
            if content:
                save_file({name: tensor.cpu().contiguous() for name, tensor in content.items()}, unfinished / file)
        commit(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_model(folder: Path, actor: LanguageModel, weights: dict[str, Tensor]) -> None:
    """What other programs open: settings, weights and tokenizer."""
    actor.module.save_pretrained(folder, state_dict=weights)
    if not actor.network.can_generate():
        actor.network.config.save_pretrained(folder)  # what a reward model's adapter folder lacks
    actor.tokenizer.save_pretrained(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(file: Path) -> str:
    """The same; a file that has stayed as it is, is read once by this process, which opens a model several times."""
    state = file.stat()
    return _remembered_sha256(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@functools.lru_cache(maxsize=1024)
def _remembered_sha256(file: Path, size: int, written_ns: int, changed_ns: int, inode: int) -> str:
    return _sha256(file)


def _random_state(device: torch.device) -> Tensor:
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
