"""The packed layout: its vectors and mask, and its equality with separate, plain forward passes of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.data.packing import pack
from alignment.groups import Completion, Group
from alignment.models.attention.sdpa import dense_mask
from alignment.models.forward import outputs
from alignment.models.load import LanguageModel, load_model
from alignment.models.output_head import linear_logprobs
from alignment.settings.data import DataConfig
from alignment.settings.model import ModelConfig


def group(prompt: list[int], *completions: list[int], rewards: tuple[float, ...] = (1.0, 0.0, -1.0)) -> Group:
    return Group(
        id="test",
        prompt="",
        prompt_tokens=tuple(prompt),
        completions=tuple(
            Completion(text="", tokens=tuple(tokens), loss_mask=(True,) * len(tokens), reward=reward)
            for tokens, reward in zip(completions, rewards, strict=False)
        ),
    )


GROUPS = [group([5, 6, 7], [10, 11], [12, 13, 14]), group([8, 9], [15, 16], rewards=(0.5,))]


@pytest.fixture(scope="module", params=["grouped", "sdpa"])
def model(tiny_model: Path, request: pytest.FixtureRequest) -> LanguageModel:
    config = ModelConfig(path=str(tiny_model), dtype="fp32", attention=request.param)
    return load_model(config, DataConfig(path="none", max_length=96), device=torch.device("cpu"), seed=0)


def random_groups(count: int, seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 300, (length,), generator=generator).tolist()

    return [group(ids(1, 20), *(ids(1, 15) for _ in range(1 + number % 3))) for number in range(count)]


def plain_logprobs(model: LanguageModel, groups: list[Group]) -> list[Tensor]:
    """Log-probabilities of every completion's tokens from one padded batch of whole sequences, without packing."""
    sequences = [(g.prompt_tokens, c.tokens) for g in groups for c in g.completions]
    width = max(len(prompt) + len(tokens) for prompt, tokens in sequences)
    rows = [[*prompt, *tokens] for prompt, tokens in sequences]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    attention = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    logits = model.module(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
    model.network.set_attn_implementation(attention)
    return [
        logits[number, len(prompt) - 1 : len(prompt) + len(tokens) - 1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        for number, (prompt, tokens) in enumerate(sequences)
    ]


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.module.named_parameters() if weight.grad is not None}


def test_the_vectors_are_those_of_the_drawing() -> None:
    batch = pack(GROUPS)
    assert batch.tokens.tolist() == [5, 6, 7, 10, 11, 12, 13, 14, 8, 9, 15, 16]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert batch.group_index.tolist() == [0] * 8 + [1] * 4
    assert batch.completion_index.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1, -1, -1, 2, 2]
    assert batch.predictor_index.tolist() == [-1, -1, -1, 2, 3, 2, 5, 6, -1, -1, 9, 10]
    assert batch.loss_mask.tolist() == [False] * 3 + [True] * 5 + [False] * 2 + [True] * 2
    assert batch.pairs.tolist() == [[0, 1]]
    assert (batch.count("token"), batch.count("completion"), batch.count("pair")) == (7, 3, 1)


def test_a_token_sees_its_prompt_and_its_own_branch_up_to_itself() -> None:
    mask = dense_mask(pack(GROUPS))
    sees = [[key for key in range(12) if mask[query, key]] for query in range(12)]
    assert sees[2] == [0, 1, 2]
    assert sees[4] == [0, 1, 2, 3, 4]
    assert sees[6] == [0, 1, 2, 5, 6], "the second completion must not see the first"
    assert sees[11] == [8, 9, 10, 11], "the second group must not see the first"


def test_ranked_completions_make_a_pair_of_every_two_with_different_rewards() -> None:
    ranked = group([1], [2], [3], [4], rewards=(0.0, 2.0, 2.0))
    assert pack([ranked]).pairs.tolist() == [[1, 0], [2, 0]]


def test_packed_log_probabilities_equal_those_of_a_plain_padded_forward(model: LanguageModel) -> None:
    groups = random_groups(9)
    with torch.no_grad():
        batch = pack(groups)
        packed = outputs(model, batch).logprobs
        for number, expected in enumerate(plain_logprobs(model, groups)):
            # A last bit of fp32 is 1e-6 at the −12 nats that some tokens have, and not every CPU sums in one order.
            torch.testing.assert_close(packed[batch.completion_index == number], expected, atol=1e-5, rtol=1e-6)


def test_packed_gradients_equal_those_of_a_plain_padded_forward(model: LanguageModel) -> None:
    groups = random_groups(9)
    weights = torch.randn(sum(len(c.tokens) for g in groups for c in g.completions)) / 50
    batch = pack(groups)
    packed = gradients(model, (outputs(model, batch).logprobs[batch.loss_mask] * weights).sum())
    plain = gradients(model, (torch.cat(plain_logprobs(model, groups)) * weights).sum())
    assert packed.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(packed[name], expected, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_neighbours_in_the_pack_change_nothing(model: LanguageModel) -> None:
    groups = random_groups(6)
    with torch.no_grad():
        together = outputs(model, pack(groups)).logprobs
        start = 0
        for one in groups:
            alone = outputs(model, pack([one])).logprobs
            torch.testing.assert_close(together[start : start + one.num_tokens], alone, atol=1e-5, rtol=0)
            start += one.num_tokens


def test_the_order_of_completions_changes_nothing(model: LanguageModel) -> None:
    one = group([5, 6, 7], [10, 11], [12, 13, 14])
    turned = dataclasses.replace(one, completions=one.completions[::-1])
    with torch.no_grad():
        first = pack([one]).per_completion(outputs(model, pack([one])).logprobs)
        second = pack([turned]).per_completion(outputs(model, pack([turned])).logprobs)
    torch.testing.assert_close(first, second.flip(0), atol=1e-5, rtol=0)


def test_log_probabilities_are_zero_where_nothing_is_learned(model: LanguageModel) -> None:
    batch = pack(GROUPS)
    with torch.no_grad():
        assert outputs(model, batch).logprobs[~batch.loss_mask].abs().max() == 0


def test_sums_never_read_what_is_not_learned() -> None:
    batch = pack(GROUPS)
    values = torch.full((12,), float("nan"))
    values[batch.loss_mask] = 1.0
    assert batch.per_completion(values).tolist() == [2.0, 3.0, 2.0]


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_log_probabilities_and_gradients_equal_the_plain_formula(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alignment.models.output_head.LOGITS_AT_ONCE", 3 * 50
    )  # chunks of three rows, the last one short
    torch.manual_seed(0)
    leaves = [torch.randn(10, 8), torch.randn(50, 8), torch.randn(50)][: 3 if bias else 2]
    targets, upstream = torch.randint(0, 50, (10,)), torch.randn(10)

    def run(ours: bool) -> tuple[Tensor, list[Tensor]]:
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        hidden, weight = inputs[:2]
        offset = inputs[2] if bias else None
        if ours:
            values, _ = linear_logprobs(hidden, weight, targets, offset)
        else:
            logits = torch.nn.functional.linear(hidden, weight, offset)
            values = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return values.detach(), list(torch.autograd.grad((values * upstream).sum(), inputs))

    torch.testing.assert_close(run(True), run(False), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_temperature_and_entropies_equal_the_plain_formula_with_their_gradients(
    temperature: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.models.output_head.LOGITS_AT_ONCE", 3 * 50)
    torch.manual_seed(0)
    leaves = [torch.randn(10, 8), torch.randn(50, 8), torch.randn(50)][: 3 if bias else 2]
    targets, upstream, for_entropy = torch.randint(0, 50, (10,)), torch.randn(10), torch.randn(10)

    def run(ours: bool, wanted: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`wanted`: 0 differentiates log-probabilities alone, 1 entropies alone, 2 both."""
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        offset = inputs[2] if bias else None
        if ours:
            values, entropies = linear_logprobs(*inputs[:2], targets, offset, temperature=temperature, entropies=True)
        else:
            logs = (torch.nn.functional.linear(*inputs[:2], offset) / temperature).log_softmax(-1)
            values, entropies = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
        losses = [(values * upstream).sum(), (entropies * for_entropy).sum()]
        loss = losses[wanted] if wanted < 2 else losses[0] + losses[1]
        return values.detach(), entropies.detach(), list(torch.autograd.grad(loss, inputs))

    for wanted in range(3):
        torch.testing.assert_close(run(True, wanted), run(False, wanted), atol=1e-5, rtol=1e-5)


def test_entropies_nobody_asked_for_are_not_computed() -> None:
    _, entropies = linear_logprobs(torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 1, 2, 3]))
    assert entropies.tolist() == [0.0] * 4


def with_gaps(groups: list[Group]) -> list[Group]:
    """The same groups, but every third token of a completion is not learned, so that some have none left at all."""

    def gapped(completion: Completion, first: int) -> Completion:
        loss_mask = tuple((place + first) % 3 > 0 for place in range(len(completion.tokens)))
        return dataclasses.replace(completion, loss_mask=loss_mask, truncated=first == 1)

    return [
        dataclasses.replace(g, completions=tuple(gapped(c, number % 3) for number, c in enumerate(g.completions)))
        for g in groups
    ]


@pytest.mark.parametrize("wanted", [[0], [4, 1], [8, 0, 3, 5], list(range(9))[::-1]])
def test_a_cut_is_what_packing_only_those_groups_would_have_given(wanted: list[int]) -> None:
    groups = with_gaps(random_groups(9))
    whole, alone = pack(groups), pack([groups[index] for index in wanted])
    cut = whole.cut(wanted)
    for name, value in vars(alone).items():
        if isinstance(value, Tensor):
            same = (
                sorted(cut.pairs.tolist()) == value.tolist()
                if name == "pairs"
                else torch.equal(getattr(cut, name), value)
            )
            assert same, name
    assert torch.equal(cut.tokens, whole.tokens[whole.token_indices(wanted)])


def test_a_cut_takes_what_was_found_out_about_its_tokens_along() -> None:
    groups = random_groups(5)
    batch = pack(groups)
    numbers = torch.arange(len(batch.tokens), dtype=torch.float32)
    batch = dataclasses.replace(batch, old_logprobs=numbers, advantages=-numbers, kl_coefficient=0.3)
    cut = batch.cut([3, 1])
    assert cut.old_logprobs is not None and cut.advantages is not None
    assert torch.equal(cut.tokens, batch.tokens[cut.old_logprobs.long()])
    assert torch.equal(cut.advantages, -cut.old_logprobs)
    assert cut.kl_coefficient == 0.3 and cut.old_values is None


def test_rows_hold_the_learned_tokens_of_each_completion_and_come_back_from_them() -> None:
    batch = pack(with_gaps(random_groups(9)))
    values = torch.arange(1.0, 1 + len(batch.tokens))
    table = batch.rows(values)
    for number in range(batch.num_completions):
        mine = values[(batch.completion_index == number) & batch.loss_mask].tolist()
        assert table[number].tolist() == mine + [0.0] * (table.shape[1] - len(mine))
    assert torch.equal(batch.from_rows(table), values * batch.loss_mask)
    assert batch.lengths.tolist() == (table > 0).sum(1).tolist()


def test_the_end_of_a_completion_is_its_last_learned_token() -> None:
    batch = pack(with_gaps(random_groups(9)))
    values = torch.arange(1.0, 1 + batch.num_completions)
    found = batch.at_last_token(values)
    for number in range(batch.num_completions):
        mine = ((batch.completion_index == number) & batch.loss_mask).nonzero().flatten().tolist()
        for token in mine:
            assert found[token] == (values[number] if token == mine[-1] else 0)
    assert found[~batch.loss_mask].abs().sum() == 0


def test_of_completions_gives_every_learned_token_its_completions_value() -> None:
    batch = pack(with_gaps(random_groups(9)))
    values = torch.arange(1.0, 1 + batch.num_completions)
    expected = [
        values[branch].item() if loss_mask else 0.0
        for branch, loss_mask in zip(batch.completion_index.tolist(), batch.loss_mask.tolist(), strict=True)
    ]
    assert batch.per_token(values).tolist() == expected
    assert batch.group_of_completion.tolist() == [
        g for g, group in enumerate(random_groups(9)) for _ in group.completions
    ]
