"""Proves for every loaded network that a packed group gives the same results as each of its sequences alone.

The packed forward pass assumes a lot about a model: only attention mixes tokens, windows and positions count inside a
sequence, nothing is random, and the logits are what the output head computes. None of this is taken on trust. The
loaded network runs two small groups packed, twice and in train mode. Then it runs each of their sequences alone, in a
row of its own, with the model's own forward pass, attention, masks and logits. A model whose results differ by more
than rounding is refused.

Both runs use fp32, whatever the format of the weights is. Every bf16 weight is also an fp32 number, while rounding in
bf16 would hide small faults and would change which experts a mixture selects. Then the packed groups are run in the
model's own format too, where they may be no further from the fp32 results than the single sequences are.

Group 0 lies at the beginning of the positions and group 1 at the end of `max_length`, so that they lie on both sides of
anything that changes with the position. Windows shorter than `max_length` are narrowed to 4 tokens during the proof.
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
from alignment.models.attention import REGISTERED, register_attention
from alignment.models.attention.sdpa import DENSE
from alignment.models.forward import outputs, scores
from alignment.models.language_model import LanguageModel
from alignment.models.logit_transform import LogitTransform
from alignment.models.output_head import linear_logprobs

GROUP_LENGTHS = ((9, (7, 4)), (3, (5, 8)))
"""Number of tokens in each group's prompt and answers. One prompt is shorter and one longer than a window,
and answers are longer than one too."""
WINDOW = 4
"""Number of tokens to which windows and chunks are narrowed."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings of a configuration that hold the length of a window."""
FP32_TOLERANCE = 2e-5
"""Nats (or points of a score) by which two fp32 results may always differ; about ten times the rounding of a small
model."""
FP32_NOISE_FACTOR = 30.0
"""In a deep model, fp32 results may differ by this many times the effect of a change in the embeddings' last bit."""
MAX_FP32_TOLERANCE = 0.01
"""Most nats of a difference in fp32 that can count as rounding."""
BF16_TOLERANCE = 0.03
"""Nats by which bf16 results may always differ from fp32 results. A bf16 number has 8 bits, so that a logit of 8 is
exact to 0.03."""
BF16_NOISE_FACTOR = 8.0
"""Packed results in bf16 may have this many times the error of single sequences in bf16, in addition."""
FP32_AT_ONCE = 1 << 30
"""Largest number of weights that are held in fp32 at once; a larger model is converted layer by layer."""
PROBE_SIZES = (0.01, 0.1, 1.0, 10.0, 1e3, 1e6)
"""Factors of the hidden states with which the logits are measured."""
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern", "attn_type_list")
"""Settings of a configuration that name the kinds of its layers."""


def prove_packing(model: LanguageModel, *, max_length: int, path: str) -> LanguageModel:
    """Proves that packing is right for a model, and returns the model with the measured transform of its logits.

    Args:
        max_length: most tokens of a sequence in this run.
        path: the model's name in the configuration.

    Raises:
        ModelError: packed and single results differ, or the network cannot be run in one of the two ways.
    """
    batch = _proof_batch(model, max_length).to(model.device)
    try:
        with _preserved_state(model, max_length), torch.no_grad():
            with _in_fp32(model):
                decoder_outputs: list[Any] = []
                with model.decoder.register_forward_hook(lambda _, __, output: decoder_outputs.append(output)):
                    single_outputs = _single_outputs(model, batch)
                if _has_language_head(model):
                    transform = _logit_transform(model, batch, decoder_outputs[0])
                    model = dataclasses.replace(model, logit_transform=transform)
                _compare(model, batch, single_outputs)
            if model.network.dtype != torch.float32 or _has_own_format_only(model):
                _compare_in_own_format(model, batch, single_outputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network may raise any error when it is run in a way that it was not made for
        reason = str(error) if isinstance(error, ModelError) else f"it cannot run ({type(error).__name__}: {error})"
        raise ModelError(
            f"model.path {path!r} ({model.network.config.model_type}; {_layer_kinds(model.network.config)}) cannot be "
            f"trained on packed groups with model.attention {model.attention}: {reason}. docs/model-families.md lists "
            "the families that can; choose one of them"
        ) from error
    return model


def _compare(model: LanguageModel, batch: Batch, single_outputs: Tensor) -> None:
    """Raises ModelError if packed passes in train mode differ from each other or from the single sequences."""
    unit = "nats" if _has_language_head(model) else "points of its score"
    model.module.train()
    packed_outputs, repeated_outputs = _packed_outputs(model, batch), _packed_outputs(model, batch)
    model.module.eval()
    pass_difference = _distance(packed_outputs, repeated_outputs)
    packing_difference = _distance(packed_outputs, single_outputs)
    if max(pass_difference, packing_difference) <= FP32_TOLERANCE:
        return
    with _last_bits_changed(model):
        rounding_difference = _distance(_single_outputs(model, batch), single_outputs)
    tolerance = min(MAX_FP32_TOLERANCE, max(FP32_TOLERANCE, FP32_NOISE_FACTOR * rounding_difference))
    if not pass_difference <= tolerance:
        raise ModelError(
            f"two passes over one batch in train mode differ by {pass_difference:.3g} {unit}: it draws at random"
        )
    if not packing_difference <= tolerance:
        raise ModelError(
            f"what it says of a sequence in a packed batch and alone differs by up to {packing_difference:.3g} {unit} "
            f"(rounding: {rounding_difference:.2g}), as it does where a layer carries a state from token to token "
            "(Mamba, gated delta nets, convolutions) and so from one answer into the next"
        )


def _compare_in_own_format(model: LanguageModel, batch: Batch, fp32_outputs: Tensor) -> None:
    """Raises ModelError if a packed pass in the model's own format is much further from fp32 than single sequences.

    Only the sequences of the first group are run alone.
    """
    packed_error = (_packed_outputs(model, batch) - fp32_outputs).abs().median()
    with _attention(model, "eager"):
        single_outputs = _single_outputs_in_own_format(model, batch)
    # The results of the first group come first.
    single_error = (single_outputs - fp32_outputs[: len(single_outputs)]).square().mean().sqrt()
    if not packed_error <= BF16_TOLERANCE + BF16_NOISE_FACTOR * single_error:
        raise ModelError(
            f"in {model.network.dtype}, packed groups are {packed_error:.3g} off what it says in fp32, and sequences "
            f"alone {single_error:.2g}"
        )


def _layer_kinds(settings: Any) -> str:
    """The kinds of layers that the configuration names, for the error message."""
    text = settings.get_text_config()
    for name in LAYER_KINDS:
        kinds = getattr(text, name, None)
        if kinds:
            return f"{name}: {', '.join(sorted(set(kinds)))}" if not isinstance(kinds, str) else f"{name}: {kinds}"
    return "its configuration names no kinds of layers"


def _proof_batch(model: LanguageModel, max_length: int) -> Batch:
    """Two groups of two answers, of tokens without a special meaning, at both ends of the positions."""
    rows = model.network.get_input_embeddings().weight.shape[0]
    ids = torch.tensor(sorted(set(range(min(rows, len(model.tokenizer)))) - _special_ids(model)))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(ids[torch.randint(len(ids), (count,), generator=generator)].tolist())

    groups = []
    for number, (prompt_length, answer_lengths) in enumerate(GROUP_LENGTHS):
        prompt_length = max(1, min(prompt_length, max_length // 2))
        sizes = [max(1, min(length, max_length - prompt_length)) for length in answer_lengths]
        completions = tuple(Completion(text="", tokens=draw(size), loss_mask=(True,) * size) for size in sizes)
        groups.append(Group(id=str(number), prompt="", prompt_tokens=draw(prompt_length), completions=completions))
        longest = prompt_length + max(sizes)
    batch = pack(groups)
    # The offset is a multiple of the window, because chunks begin at multiples of their size.
    offset = max(0, (max_length - longest) // WINDOW * WINDOW)
    return dataclasses.replace(batch, positions=batch.positions + offset * (batch.group_index == 1))


def _special_ids(model: LanguageModel) -> set[int]:
    """Ids that a network may treat specially, such as padding and placeholders of images."""
    ids = set(model.tokenizer.all_special_ids)
    for settings in (model.network.config, model.network.config.get_text_config()):
        for name, value in settings.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                ids.add(value)
    return ids


def _has_language_head(model: LanguageModel) -> bool:
    """Whether the model gives logits of a vocabulary rather than scores."""
    return model.network.get_output_embeddings() is not None


def _packed_outputs(model: LanguageModel, batch: Batch) -> Tensor:
    """[n] log-probability of each answer's tokens, or [N] scores, from the packed pass that training uses."""
    if _has_language_head(model):
        return outputs(model, batch).logprobs[batch.loss_mask]
    return scores(model, batch)


def _single_outputs(model: LanguageModel, batch: Batch) -> Tensor:
    """The same results from the model's own forward pass, with each sequence in a row of its own."""
    if not _has_language_head(model):
        return _single_scores(model, batch)
    results = []
    with _attention(model, "eager"):
        for rows in _sequences(batch):
            # The first group has the positions that every model gives to a sequence by default.
            position_kwargs = {} if rows.first_position == 0 else {"position_ids": rows.positions}
            logits = model.network(input_ids=rows.tokens, use_cache=False, **position_kwargs).logits
            for row, tokens, (start, end) in zip(logits, rows.tokens, rows.answers, strict=True):
                logprobs = row[start - 1 : end - 1].float().log_softmax(-1)
                results.append(logprobs.gather(1, tokens[start:end, None]).squeeze(1))
    return torch.cat(results)


def _single_scores(model: LanguageModel, batch: Batch) -> Tensor:
    """[N] scores. Rows are run one at a time, because transformers finds the end of a sequence by its padding."""
    results = []
    with _attention(model, "eager"):
        for rows in _sequences(batch):
            for tokens, positions, (_, end) in zip(rows.tokens, rows.positions, rows.answers, strict=True):
                position_kwargs = {} if rows.first_position == 0 else {"position_ids": positions[None, :end]}
                logits = model.network(input_ids=tokens[None, :end], use_cache=False, **position_kwargs).logits
                results.append(logits[0].float())
    return torch.cat(results)


def _single_outputs_in_own_format(model: LanguageModel, batch: Batch) -> Tensor:
    """The same results for the answers of the first group, from the decoder and the head that training uses."""
    rows = next(_sequences(batch))
    states = model.decoder(input_ids=rows.tokens, position_ids=rows.positions, use_cache=False).last_hidden_state
    results = []
    for row, tokens, (start, end) in zip(states, rows.tokens, rows.answers, strict=True):
        if _has_language_head(model):
            head = model.network.get_output_embeddings()
            transform = model.logit_transform
            answer_states, answer_tokens = row[start - 1 : end - 1], tokens[start:end]
            results.append(
                linear_logprobs(answer_states, head.weight, answer_tokens, head.bias, transform=transform)[0]
            )
        else:
            results.append(model.network.score(row[end - 1 : end].float())[0])
    return torch.cat(results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GroupRows:
    """A group's prompt with each of its answers."""

    tokens: Tensor
    """[answers, T] token ids. A shorter row repeats its last token, which a causal network does not see earlier."""
    positions: Tensor
    """[answers, T] position of each token in its sequence."""
    answers: list[tuple[int, int]]
    """The start and the end of each row's answer."""

    @property
    def first_position(self) -> int:
        """The position of the first token."""
        return int(self.positions[0, 0])


def _sequences(batch: Batch) -> Iterator[_GroupRows]:
    """The sequences of each group of a packed batch, as rows."""
    for group in range(int(batch.group_index.max()) + 1):
        in_group = batch.group_index == group
        index = batch.completion_index
        completions = sorted(set(index[in_group & (index >= 0)].tolist()))
        rows = [in_group & ((index == -1) | (index == completion)) for completion in completions]
        lengths = [int(row.sum()) for row in rows]
        columns = torch.arange(max(lengths), device=batch.tokens.device)
        row_indices = [columns.clamp(max=length - 1) for length in lengths]
        yield _GroupRows(
            tokens=torch.stack([batch.tokens[row][i] for row, i in zip(rows, row_indices, strict=True)]),
            positions=torch.stack([batch.positions[row][i] for row, i in zip(rows, row_indices, strict=True)]),
            answers=[
                (length - int((index == completion).sum()), length)
                for completion, length in zip(completions, lengths, strict=True)
            ],
        )


def _distance(values: Tensor, baseline: Tensor) -> float:
    """The largest absolute difference of two results; inf if one of them is not finite."""
    differences = (values - baseline).abs()
    return float(differences.max()) if bool(differences.isfinite().all()) else float("inf")


def _logit_transform(model: LanguageModel, batch: Batch, decoder_output: Any) -> LogitTransform:
    """Measures how the network transforms the logits of its output head, with hidden states of many sizes.

    Args:
        decoder_output: an output of the decoder. Its hidden states are replaced, and the network gets it again.

    Raises:
        ModelError: the transform is neither a factor nor a cap.
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
    head_logits = nn.functional.linear(probe, head.weight, head.bias).double()
    if head_logits.shape != logits.shape:
        raise ModelError(f"the output head has {head_logits.shape[1]} rows and the model {logits.shape[1]} logits")
    transform = _fit_transform(head_logits, logits)
    sizes = head_logits.abs().mean(1, keepdim=True)
    error = (transform.apply_(head_logits.float()).double() - logits).abs() / (sizes + 1e-3)
    if not float(error.max()) <= 1e-4:
        raise ModelError("the model bends its logits neither by a factor nor by a cap, which is all that is known here")
    return transform


def _fit_transform(head_logits: Tensor, logits: Tensor) -> LogitTransform:
    """Finds the factor and the cap that turn the output head's logits into the model's.

    Args:
        head_logits: [sizes, V] logits of the output head; each row comes from larger hidden states than the one before.
        logits: [sizes, V] logits of the model for the same hidden states.
    """
    # Large logits reach a cap exactly, and small logits do not feel it.
    smallest, largest = head_logits[0], head_logits[-1]
    large_columns = largest.abs() > 0.5 * largest.abs().max()
    capped_logits = logits[-1].abs()[large_columns]
    cap = float(capped_logits.max())
    is_capped = float(capped_logits.min()) > cap * (1 - 1e-6)
    columns = smallest.abs() > 0.1 * smallest.abs().max()  # the others are too close to 0 for a quotient
    row = logits[0][columns] / cap if is_capped else logits[0][columns]
    uncapped_row = torch.atanh(row.clamp(-0.999, 0.999)) * cap if is_capped else row
    scale = float((uncapped_row / smallest[columns]).median())
    scale = float(f"{scale:.6g}")
    return LogitTransform(scale=scale, cap=float(f"{cap:.6g}") if is_capped else None)


@contextlib.contextmanager
def _preserved_state(model: LanguageModel, max_length: int) -> Iterator[None]:
    """Restores the module, its settings and the process's random state at the end."""
    modes = [(submodule, submodule.training) for submodule in model.module.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _narrow_windows(model, max_length), _no_dropout(model):
        model.module.eval()
        try:
            yield
        finally:
            for submodule, training in modes:
                submodule.training = training


@contextlib.contextmanager
def _narrow_windows(model: LanguageModel, max_length: int) -> Iterator[None]:
    """Narrows windows that are shorter than the run's sequences to `WINDOW` tokens; longer ones have no effect."""
    networks = [submodule for submodule in model.network.modules() if isinstance(submodule, PreTrainedModel)]
    windows = []
    for settings in {id(network.config): network.config for network in networks}.values():
        for name in WINDOWS:
            width = getattr(settings, name, None)
            if isinstance(width, int) and WINDOW < width < max_length:
                windows.append((settings, name, width))
    for settings, name, _ in windows:
        setattr(settings, name, WINDOW)
    try:
        yield
    finally:
        for settings, name, width in windows:
            setattr(settings, name, width)


@contextlib.contextmanager
def _no_dropout(model: LanguageModel) -> Iterator[None]:
    """Turns off the dropout of an adapter, which is allowed in training."""
    rates = [(dropout, dropout.p) for dropout in model.module.modules() if isinstance(dropout, nn.Dropout)]
    for dropout, _ in rates:
        dropout.p = 0.0
    try:
        yield
    finally:
        for dropout, rate in rates:
            dropout.p = rate


@contextlib.contextmanager
def _attention(model: LanguageModel, name: str) -> Iterator[None]:
    """Gives the network another attention, such as one of transformers' own."""
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
    """Changes the last bit of the embeddings, as another order of rounding could."""
    generator = torch.Generator(model.device).manual_seed(0)

    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator, device=output.device) * 2 - 1
        return output * (1 + signs * torch.finfo(torch.float32).eps)

    hook = model.network.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def _has_own_format_only(model: LanguageModel) -> bool:
    """Whether the network's attention computes in the model's own number format only."""
    return REGISTERED[model.network.config._attn_implementation].only_own_format


@contextlib.contextmanager
def _in_fp32(model: LanguageModel) -> Iterator[None]:
    """Makes the network compute in fp32, a large one layer by layer. The weights are restored exactly."""
    if model.network.dtype == torch.float32 and not _has_own_format_only(model):
        yield
        return
    layers = _layers(model.network) if model.network.num_parameters() > FP32_AT_ONCE else []
    layer_weight_ids = {id(weight) for layer in layers for weight in layer.parameters()}
    with contextlib.ExitStack() as stack:
        if _has_own_format_only(model):
            # The dense form has the same masks.
            register_attention(DENSE)
            stack.enter_context(_attention(model, DENSE.implementation))
        for layer in layers:
            stack.callback(_widen_during_forward(layer))
        restore = _widen(weight for weight in model.module.parameters() if id(weight) not in layer_weight_ids)
        stack.callback(restore)
        yield


def _layers(network: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: the modules in the outermost lists."""
    layers: list[nn.Module] = []
    for child in network.children():
        layers += [*child] if isinstance(child, nn.ModuleList) else _layers(child)
    return layers


def _widen_during_forward(layer: nn.Module) -> Callable[[], None]:
    """Makes a layer's weights fp32 while the layer is called; returns a function that undoes that."""
    restore: list[Callable[[], None]] = []
    pre_hook = layer.register_forward_pre_hook(lambda *_: restore.append(_widen(layer.parameters())))
    post_hook = layer.register_forward_hook(lambda *_: restore.pop()(), always_call=True)

    def undo() -> None:
        pre_hook.remove()
        post_hook.remove()

    return undo


def _widen(weights: Iterator[Tensor]) -> Callable[[], None]:
    """Makes bf16 weights fp32 in place; returns a function that puts the same bf16 tensors back."""
    originals: Mapping[Tensor, Tensor] = {weight: weight.data for weight in weights if weight.dtype == torch.bfloat16}
    for weight, data in originals.items():
        weight.data = data.float()

    def restore() -> None:
        for weight, data in originals.items():
            weight.data = data

    return restore
