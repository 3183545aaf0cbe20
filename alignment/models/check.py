"""Proves of every loaded network that packed groups get what each sequence gets alone.

The packed forward pass relies on much that a model could do otherwise: that only attention mixes tokens, that windows
and positions count inside a sequence, that nothing is random, that logits are what the output head says. None of that
is believed. The loaded network itself runs two small groups packed, in train mode and twice, and every sequence of them
alone, in a row of its own: by the model's own forward, with the attention and the masks that transformers makes for it,
to the model's own logits. What differs by more than rounding is refused.

Both are computed in fp32, whatever the weights' format: a bf16 weight is an fp32 number, and in bf16's own arithmetic
rounding would hide small faults, and flip the experts of mixtures. Then the same is run in the model's own format, and
may be no further from the fp32 figures than the sequences alone are.

Group 0 lies at the beginning of the positions and group 1 at the end of `max_length`, on both sides of whatever
changes with the position. Windows that `max_length` reaches beyond are narrowed to 4 tokens for the time of the proof.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.batch import Batch
from alignment.data.packing import pack
from alignment.errors import ModelError
from alignment.groups import Completion, Group
from alignment.models.attention import IMPLEMENTATIONS
from alignment.models.forward import linear_logprobs, outputs, scores
from alignment.models.language_model import LanguageModel, LogitTransform

LENGTHS = ((9, (7, 4)), (3, (5, 8)))
"""Tokens of each group's prompt and answers: prompts shorter and longer than a window, and answers that cross one."""
WINDOW = 4
"""Tokens to which windows and chunks are narrowed."""
WINDOWS = ("sliding_window", "attention_chunk_size")
ROUNDING = 2e-5
"""Nats (or units of a score) by which two fp32 computations of one figure may always differ: about ten times what
they do in a small model."""
SPREADS = 30.0
"""How many times further apart they may be than two runs whose embeddings differ in the last bit, in a deep model."""
MOST = 0.01
"""Most nats that are ever taken for rounding in fp32."""
FORMAT_ROUNDING = 0.03
"""The same in bf16, whose numbers have 8 bits: a logit of 8 is known to 0.03."""
FORMAT_SPREADS = 8.0
FP32_AT_ONCE = 1 << 30
"""Weights that are held in fp32 at a time; a larger model is widened layer by layer."""
PROBE_SIZES = (0.01, 0.1, 1.0, 10.0, 1e3, 1e6)
"""Factors of the hidden states by which logits are measured."""
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern", "attn_type_list")


def prove_packing(model: LanguageModel, *, max_length: int, path: str) -> LanguageModel:
    """Returns the model with what its network does to logits, after the proof that this and its packing are right.

    Args:
        max_length: most tokens of a sequence in this run.
        path: what the configuration calls the model.

    Raises:
        ModelError: packed and alone differ, or the network cannot be run in one of both ways.
    """
    batch = _batch(model, max_length).to(model.device)
    try:
        with _undisturbed(model, max_length), torch.no_grad():
            with _in_fp32(model):
                decoder_outputs: list[Any] = []
                with model.decoder.register_forward_hook(lambda _, __, output: decoder_outputs.append(output)):
                    alone = _alone(model, batch)
                if _has_language_head(model):
                    transform = _logit_transform(model, batch, decoder_outputs[0])
                    model = dataclasses.replace(model, logit_transform=transform)
                _compare(model, batch, alone)
            if model.network.dtype != torch.float32 or model.attention == "flex":
                _compare_in_own_format(model, batch, alone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network of any family may raise anything when it is run in a way that it is not for
        what = str(error) if isinstance(error, ModelError) else f"it cannot run ({type(error).__name__}: {error})"
        raise ModelError(
            f"model.path {path!r} ({model.network.config.model_type}; {_layer_kinds(model.network.config)}) cannot be "
            f"trained on packed groups with model.attention {model.attention}: {what}. docs/model-families.md lists "
            "the families that can; choose one of them"
        ) from error
    return model


def _compare(model: LanguageModel, batch: Batch, alone: Tensor) -> None:
    """Raises ModelError if packed passes in train mode differ from each other, or from the sequences alone."""
    unit = "nats" if _has_language_head(model) else "points of its score"
    model.module.train()
    packed, again = _packed(model, batch), _packed(model, batch)
    model.module.eval()
    random, apart = _distance(packed, again), _distance(packed, alone)
    if max(random, apart) <= ROUNDING:
        return
    with _last_bits_changed(model):
        spread = _distance(_alone(model, batch), alone)
    rounding = min(MOST, max(ROUNDING, SPREADS * spread))
    if not random <= rounding:
        raise ModelError(f"two passes over one batch in train mode differ by {random:.3g} {unit}: it draws at random")
    if not apart <= rounding:
        raise ModelError(
            f"what it says of a sequence in a packed batch and alone differs by up to {apart:.3g} {unit} (rounding: "
            f"{spread:.2g}), as it does where a layer carries a state from token to token (Mamba, gated delta nets, "
            "convolutions) and so from one answer into the next"
        )


def _compare_in_own_format(model: LanguageModel, batch: Batch, exact: Tensor) -> None:
    """Raises ModelError if packed passes in the model's own format are much further from the fp32 figures than
    sequences alone are, of which those of the first group are asked."""
    packed = (_packed(model, batch) - exact).abs().median()
    with _attention(model, "eager"):
        alone = _alone_in_own_format(model, batch)
    spread = (alone - exact[: len(alone)]).square().mean().sqrt()  # the first group's come first
    if not packed <= FORMAT_ROUNDING + FORMAT_SPREADS * spread:
        raise ModelError(
            f"in {model.network.dtype}, packed groups are {packed:.3g} off what it says in fp32, and sequences alone "
            f"{spread:.2g}"
        )


def _layer_kinds(settings: Any) -> str:
    """What the configuration says of the kinds of its layers."""
    text = settings.get_text_config()
    for name in LAYER_KINDS:
        kinds = getattr(text, name, None)
        if kinds:
            return f"{name}: {', '.join(sorted(set(kinds)))}" if not isinstance(kinds, str) else f"{name}: {kinds}"
    return "its configuration names no kinds of layers"


def _batch(model: LanguageModel, max_length: int) -> Batch:
    """Two groups of two answers, of tokens that mean nothing special, at both ends of the positions."""
    rows = model.network.get_input_embeddings().weight.shape[0]
    ids = torch.tensor(sorted(set(range(min(rows, len(model.tokenizer)))) - _special_ids(model)))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(ids[torch.randint(len(ids), (count,), generator=generator)].tolist())

    groups = []
    for number, (prompt, answers) in enumerate(LENGTHS):
        prompt = max(1, min(prompt, max_length // 2))
        sizes = [max(1, min(answer, max_length - prompt)) for answer in answers]
        completions = tuple(Completion(text="", tokens=draw(size), learned=(True,) * size) for size in sizes)
        groups.append(Group(id=str(number), prompt="", prompt_tokens=draw(prompt), completions=completions))
        longest = prompt + max(sizes)
    batch = pack(groups)
    # A multiple of the window, for chunks begin at multiples of their size.
    offset = max(0, (max_length - longest) // WINDOW * WINDOW)
    return dataclasses.replace(batch, positions=batch.positions + offset * (batch.groups == 1))


def _special_ids(model: LanguageModel) -> set[int]:
    """Ids that a network may treat in its own way: padding, and places of pictures."""
    ids = set(model.tokenizer.all_special_ids)
    for settings in (model.network.config, model.network.config.get_text_config()):
        named = {value for name, value in settings.to_dict().items() if name.endswith(("_token_id", "_token_index"))}
        ids |= {value for value in named if isinstance(value, int)}
    return ids


def _has_language_head(model: LanguageModel) -> bool:
    return model.network.get_output_embeddings() is not None


def _packed(model: LanguageModel, batch: Batch) -> Tensor:
    """[n] log-probability of every answer's token, or [N] scores, by the packed pass that training makes."""
    if _has_language_head(model):
        return outputs(model, batch).logprobs[batch.learned]
    return scores(model, batch)


def _alone(model: LanguageModel, batch: Batch) -> Tensor:
    """The same by the model's own forward, attention, masks and logits, each sequence in a row of its own."""
    if not _has_language_head(model):
        return _scores_alone(model, batch)
    results = []
    with _attention(model, "eager"):
        for rows in _sequences(batch):
            # The first group lies where every model puts a sequence by itself.
            where = {} if rows.begin == 0 else {"position_ids": rows.positions}
            logits = model.network(input_ids=rows.tokens, use_cache=False, **where).logits
            for row, tokens, (begin, end) in zip(logits, rows.tokens, rows.answers, strict=True):
                logprobs = row[begin - 1 : end - 1].float().log_softmax(-1)
                results.append(logprobs.gather(1, tokens[begin:end, None]).squeeze(1))
    return torch.cat(results)


def _scores_alone(model: LanguageModel, batch: Batch) -> Tensor:
    """[N] scores. One row at a time: where a sequence ends, transformers tells by padding."""
    results = []
    with _attention(model, "eager"):
        for rows in _sequences(batch):
            for tokens, positions, (_, end) in zip(rows.tokens, rows.positions, rows.answers, strict=True):
                where = {} if rows.begin == 0 else {"position_ids": positions[None, :end]}
                results.append(model.network(input_ids=tokens[None, :end], use_cache=False, **where).logits[0].float())
    return torch.cat(results)


def _alone_in_own_format(model: LanguageModel, batch: Batch) -> Tensor:
    """The same for the answers of the first group, by the decoder alone and the head as in training."""
    rows = next(_sequences(batch))
    states = model.decoder(input_ids=rows.tokens, position_ids=rows.positions, use_cache=False).last_hidden_state
    results = []
    for row, tokens, (begin, end) in zip(states, rows.tokens, rows.answers, strict=True):
        if _has_language_head(model):
            head = model.network.get_output_embeddings()
            transform = model.logit_transform
            states_before, own = row[begin - 1 : end - 1], tokens[begin:end]
            results.append(linear_logprobs(states_before, head.weight, own, head.bias, transform=transform)[0])
        else:
            results.append(model.network.score(row[end - 1 : end].float())[0])
    return torch.cat(results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """A group's prompt with each of its answers."""

    tokens: Tensor
    """[answers, T]; a row's last token again behind its end, which no causal network sees before."""
    positions: Tensor
    """[answers, T]"""
    answers: list[tuple[int, int]]
    """Where each row's answer begins and ends."""

    @property
    def begin(self) -> int:
        """The first position."""
        return int(self.positions[0, 0])


def _sequences(batch: Batch) -> Iterator[_Rows]:
    for group in range(int(batch.groups.max()) + 1):
        of_group = batch.groups == group
        branches = sorted(set(batch.branches[of_group & (batch.branches >= 0)].tolist()))
        rows = [of_group & ((batch.branches == -1) | (batch.branches == branch)) for branch in branches]
        lengths = [int(row.sum()) for row in rows]
        index = [torch.arange(max(lengths), device=batch.tokens.device).clamp(max=length - 1) for length in lengths]
        yield _Rows(
            tokens=torch.stack([batch.tokens[row][places] for row, places in zip(rows, index, strict=True)]),
            positions=torch.stack([batch.positions[row][places] for row, places in zip(rows, index, strict=True)]),
            answers=[
                (length - int((batch.branches == branch).sum()), length)
                for branch, length in zip(branches, lengths, strict=True)
            ],
        )


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, inf if one is no number."""
    apart = (left - right).abs()
    return float(apart.max()) if bool(apart.isfinite().all()) else float("inf")


def _logit_transform(model: LanguageModel, batch: Batch, decoder_output: Any) -> LogitTransform:
    """Measures what the network does between its decoder and its logits, on hidden states of many sizes.

    Args:
        decoder_output: one that the decoder made of something else; it is given again, with other hidden states.

    Raises:
        ModelError: it is no factor and no cap.
    """
    tokens = batch.tokens[: len(PROBE_SIZES)]
    head = model.network.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, head.weight.shape[1], generator=generator).to(model.device)
    probe = probe * torch.tensor(PROBE_SIZES, device=model.device)[:, None]
    decoder_output.last_hidden_state = probe[None]
    decoder = model.decoder
    forward = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: decoder_output
    try:
        with _attention(model, "eager"):
            logits = model.network(input_ids=tokens[None], use_cache=False).logits[0].double()
    finally:
        del decoder.forward
        if forward is not None:
            decoder.forward = forward
    raw = nn.functional.linear(probe, head.weight, head.bias).double()
    if raw.shape != logits.shape:
        raise ModelError(f"the output head has {raw.shape[1]} rows and the model {logits.shape[1]} logits")
    transform = _fitted(raw, logits)
    error = (transform.apply_(raw.float()).double() - logits).abs() / (raw.abs().mean(1, keepdim=True) + 1e-3)
    if not float(error.max()) <= 1e-4:
        raise ModelError("the model bends its logits neither by a factor nor by a cap, which is all that is known here")
    return transform


def _fitted(raw: Tensor, logits: Tensor) -> LogitTransform:
    """
    Args:
        raw: [sizes, V] what the output head says of hidden states, each row larger than the one before.
        logits: [sizes, V] what the model says of them.
    """
    # A cap is reached exactly where logits are large, and is not felt where they are small.
    large = logits[-1].abs()
    sure = raw[-1].abs() > 0.5 * raw[-1].abs().max()
    cap = float(large[sure].max())
    capped = float(large[sure].min()) > cap * (1 - 1e-6)
    small = raw[0].abs() > 0.1 * raw[0].abs().max()
    row = logits[0][small] / cap if capped else logits[0][small]
    straight = torch.atanh(row.clamp(-0.999, 0.999)) * cap if capped else row
    scale = float((straight / raw[0][small]).median())
    scale = float(f"{scale:.6g}")
    return LogitTransform(scale=scale, cap=float(f"{cap:.6g}") if capped else None)


@contextlib.contextmanager
def _undisturbed(model: LanguageModel, max_length: int) -> Iterator[None]:
    """Leaves the module, its settings and the process's random numbers as they were."""
    modes = [(part, part.training) for part in model.module.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _narrow_windows(model, max_length), _no_dropout(model):
        model.module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextlib.contextmanager
def _narrow_windows(model: LanguageModel, max_length: int) -> Iterator[None]:
    """Windows that the run's sequences reach beyond are `WINDOW` tokens; the rest is out of reach."""
    configs = {id(part.config): part.config for part in model.network.modules() if isinstance(part, PreTrainedModel)}
    narrowed = []
    for settings in configs.values():
        for name in WINDOWS:
            width = getattr(settings, name, None)
            if isinstance(width, int) and WINDOW < width < max_length:
                narrowed.append((settings, name, width))
    for settings, name, _ in narrowed:
        setattr(settings, name, WINDOW)
    try:
        yield
    finally:
        for settings, name, width in narrowed:
            setattr(settings, name, width)


@contextlib.contextmanager
def _no_dropout(model: LanguageModel) -> Iterator[None]:
    """An adapter's dropout, which is allowed, is off."""
    rates = [(part, part.p) for part in model.module.modules() if isinstance(part, nn.Dropout)]
    for part, _ in rates:
        part.p = 0.0
    try:
        yield
    finally:
        for part, rate in rates:
            part.p = rate


@contextlib.contextmanager
def _attention(model: LanguageModel, name: str) -> Iterator[None]:
    """The network with another attention, as one of transformers' own."""
    previous = model.network.config._attn_implementation
    model.network.set_attn_implementation(name)
    if model.network.config._attn_implementation != name:
        raise ModelError("its attention is its own and cannot be exchanged, so that it knows nothing of packed groups")
    try:
        yield
    finally:
        model.network.set_attn_implementation(previous)


@contextlib.contextmanager
def _last_bits_changed(model: LanguageModel) -> Iterator[None]:
    """Embeddings that are off by one bit, as other roundings would make them."""
    generator = torch.Generator(model.device).manual_seed(0)

    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        sides = torch.randint(2, output.shape, generator=generator, device=output.device) * 2 - 1
        return output * (1 + sides * torch.finfo(torch.float32).eps)

    hook = model.network.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _in_fp32(model: LanguageModel) -> Iterator[None]:
    """The network computes in fp32; large ones hold one widened layer at a time. Nothing is lost on the way back."""
    if model.network.dtype == torch.float32 and model.attention != "flex":
        yield
        return
    layers = _layers(model.network) if model.network.num_parameters() > FP32_AT_ONCE else []
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    with contextlib.ExitStack() as stack:
        if model.attention == "flex":
            # Its kernels are for the model's own format; its masks are the same in the dense form.
            stack.enter_context(_attention(model, IMPLEMENTATIONS["sdpa"]))
        for layer in layers:
            stack.callback(_widen_in_passing(layer))
        restore = _widen(weight for weight in model.module.parameters() if id(weight) not in inside)
        stack.callback(restore)
        yield


def _layers(network: nn.Module) -> list[nn.Module]:
    """The parts of the outermost lists: a decoder's layers."""
    layers: list[nn.Module] = []
    for part in network.children():
        layers += [*part] if isinstance(part, nn.ModuleList) else _layers(part)
    return layers


def _widen_in_passing(layer: nn.Module) -> Callable[[], None]:
    """Widens a layer while it is called; returns what undoes that."""
    restore: list[Callable[[], None]] = []
    before = layer.register_forward_pre_hook(lambda *_: restore.append(_widen(layer.parameters())))
    after = layer.register_forward_hook(lambda *_: restore.pop()(), always_call=True)

    def undo() -> None:
        before.remove()
        after.remove()

    return undo


def _widen(weights: Iterator[Tensor]) -> Callable[[], None]:
    """Makes weights fp32 in place; returns what brings back the very tensors that they were."""
    narrow: Mapping[Tensor, Tensor] = {weight: weight.data for weight in weights if weight.dtype == torch.bfloat16}
    for weight, data in narrow.items():
        weight.data = data.float()

    def restore() -> None:
        for weight, data in narrow.items():
            weight.data = data

    return restore
