"""A Group: one prompt and its completions, as text and as tokens; it goes round the whole circle. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: `system`, `user`, `assistant`, or what the chat template knows besides."""
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the message has beyond that (`tool_calls`, `reasoning_content`, `name`, …), for the chat template."""
    trained: bool = True
    """False if the data marks it as context (`weight: 0`): an assistant's turn is then not trained on."""
    truncated: bool = False
    """True if the text stops where its speaker was cut off (`finish_reason: length`), so that no end token follows."""

    def template_fields(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer to a group's prompt."""

    text: str
    """The answer as the data gives it."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the answer's message has beyond its text (`tool_calls`, `reasoning_content`, …), for the chat template."""
    following: tuple[Message, ...] = ()
    """Turns after the answer, for a conversation that is trained on as one example."""
    reward: float | None = None
    """How good it is, in any unit in which higher is better; None if nobody has said."""
    environment_reward: float | None = None
    """What an environment gave for it, which the scorers' rewards are added to; None without one."""
    tokens: tuple[int, ...] = ()
    """Token ids as they follow the prompt, with the end token if the answer ends; empty before tokenisation."""
    loss_mask: tuple[bool, ...] = ()
    """Which of `tokens` are trained on; the rest is context (another speaker's turn)."""
    truncated: bool = False
    """True if its end was cut off, to fit the window or where it was sampled: it has no end token."""
    reference_logprobs: Tensor | None = field(default=None, compare=False)
    """[len(tokens)] fp32 log-probability (nats) of each token under the reference model, once known; 0 where not
    trained on. A view of the whole data set's."""
    sampled_logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each of `tokens` as it was sampled, temperature and all; None if it was not sampled by
    us."""
    weight_version: int | None = None
    """Version of the weights that sampled it: optimizer steps done by then."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What each scorer gave, before weights, by the scorer's name; a scorer that abstained is left out."""

    @property
    def learned(self) -> tuple[bool, ...]:
        """The name of before for `loss_mask`; it goes with the next release."""
        return self.loss_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt and its completions: an SFT example (one), a preference pair (two), ranked answers or rollouts (many).

    Example: `Group(id="pairs.jsonl:7", prompt="2 + 2 =", completions=(Completion(text=" 4", reward=1.0),
    Completion(text=" 5", reward=0.0)))` is a preference pair.
    """

    id: str
    """Where it came from, as `file:line`."""
    prompt: str | tuple[Message, ...]
    """Plain text, or the turns before the answer."""
    completions: tuple[Completion, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    """Token ids of the prompt, shared by all completions; empty before tokenisation."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call, for the chat template."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the row tells its chat template besides, as `{"enable_thinking": False}`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row that `data.keep` names, for scorers that compare with a known answer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all completions."""
        return len(self.prompt_tokens) + sum(len(completion.tokens) for completion in self.completions)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices (chosen, rejected) of every two completions with different rewards, and different tokens once they
        have some: within the window, two answers may be the same."""
        ratings = [(index, c.reward, c.tokens) for index, c in enumerate(self.completions) if c.reward is not None]
        return [
            (chosen, rejected)
            for chosen, chosen_reward, chosen_tokens in ratings
            for rejected, rejected_reward, rejected_tokens in ratings
            if chosen_reward > rejected_reward and (chosen_tokens != rejected_tokens or not chosen_tokens)
        ]
