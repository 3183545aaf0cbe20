"""Every shape that people keep preferences in, turned into a Group."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.files import Cell, Row
from alignment.errors import DataError, WithoutWeight
from alignment.groups import Completion, Group, Message
from alignment.settings.data import SourceConfig
from alignment.settings.model import is_template_variable

STACK_EXCHANGE = {"chosen": "response_j", "rejected": "response_k"}
STACK_EXCHANGE_PROMPT = "Question: {question}\n\nAnswer: "
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""Of Stanford's Alpaca, for prompts that are plain text."""
ALIASES = {
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "kto_tag"),
    "tools": ("tools", "functions"),
}
"""Columns that stand for a field where `columns` names none, the usual one first; ShareGPT's, LLaMA-Factory's,
OpenAI's old ones."""
ALPACA = {"completion": ("output", "response"), "input": ("input", "context")}
"""Columns beside an `instruction`, in Alpaca's and in Dolly's words."""
SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for word in ("score", "rating", "reward")
    for name in (f"{word}_{{}}", f"{{}}_{word}", f"{{}}-{word}", f"{{}}_avg_{word}")
)
"""Columns that say how good the two answers of a pair are."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "ai", "bot", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{role: role for role in ("system", "developer", "function_call")},
}
"""What speakers are called elsewhere, in small letters, and what chat templates call them."""
FLT_MAX = 3.4e38
"""Rewards become fp32."""
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
FINISH_REASONS = ("finish_reason", "stop_reason")
"""Why an answer ends, in OpenAI's and in Anthropic's words; vLLM's `stop_reason` may be the number of a token."""
CUT_OFF = (
    *("length", "max_tokens", "model_length", "max_output_tokens", "model_context_window_exceeded"),
    *("content_filter", "abort", "incomplete"),
)
"""Finish reasons of an answer that was stopped, in the words of OpenAI, Anthropic, Mistral and vLLM."""
LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "up", "thumbs_up", "desirable", "👍"), 1),
    **dict.fromkeys(("false", "0", "0.0", "no", "bad", "down", "thumbs_down", "undesirable", "👎"), 0),
}
"""Labels as tables and people write them, in small letters."""
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask")
"""Fields by which a message says whether it is trained on, in OpenAI's and Mistral's words, axolotl's and Swift's."""
PARTS_TRAINED = ("train_detail", "training_detail")
"""Fields by which axolotl trains on parts of a message."""
TREE = ("parent_id", "message_tree_id")
"""Columns of a row that is one message of a conversation, as Open Assistant's are."""

Prompt = str | tuple[Message, ...]


class ReadRow(dict[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)

    @property
    def unread(self) -> list[str]:
        """Columns with something in them that nothing asked for."""
        return [column for column, value in self.items() if column not in self.read and value not in (None, "", [], {})]


def to_group(row: Row, origin: str, source: SourceConfig) -> Group:
    """Reads one row in whichever shape it has, with the columns that `keep` names beside it.

    Shapes, by the fields present (after `columns`): `chosen` + `rejected` with a prompt, as strings or message lists;
    the same without a prompt, as message lists or "\\n\\nHuman: … \\n\\nAssistant: …" transcripts that share their
    beginning; `question` + `response_j` + `response_k`; `completions` + `rewards`; `completion` with or without a
    `label`; `messages` (ShareGPT's `conversations`), with or without a `label` of the last answer; `instruction`,
    `input` and `output` as in Alpaca; `text`; a prompt alone. A prompt may be `messages` too, or an `instruction`.
    Lists may be given as JSON text. Beside any of them: `system`, a text that becomes the first turn; `tools` and
    `chat_template_kwargs`, for the template; `finish_reason` or `truncated`, which say what was cut off where it was
    sampled; a `weight` of 1, or of 0 for what is not to be learned from.

    Raises:
        WithoutWeight: the row is in order, and its weight says that nothing is to be learned from it.
        DataError: the row is unusable; the text says why, without the origin.
    """
    columns = {column: _kept(_cell(row, column, f"column {column!r} (keep)")) for column in source.keep}
    shape = _Shape(row, source)
    _check_columns(shape)
    group, tools = _shaped(shape, origin), _tools(shape)
    if tools and isinstance(group.prompt, str) and shape.columns.get("tools", "tools") not in shape.used:
        raise DataError("tools are given, and plain text has no place for them; set prompt_as to user_message")
    return dataclasses.replace(
        group,
        prompt=_with_system(group.prompt, shape),
        tools=tools,
        chat_template_kwargs=_template_kwargs(shape),
        columns=columns,
    )


def has_equal_scores(row: Row) -> bool:
    """Whether a row's scores of chosen and rejected are the same number, so that its order is all there is."""
    return any(len(set(pair)) == 1 for pair in _score_pairs(row))


def _cell(row: Row, column: str, what: str) -> Any:
    """What a column holds: one of that name, or what is in it by dots, as `reward_model.ground_truth`.

    Raises:
        DataError: there is none; `what` names it.
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = _decoded(value)
        if isinstance(value, list | tuple) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise DataError(f"{what} is missing")
    return value


def _kept(value: Any) -> Any:
    """A column for scorers as it is; of a table, what its text stands for: a number, true or false, or a list."""
    if not isinstance(value, Cell):
        return value
    try:
        meaning = json.loads({"True": "true", "False": "false"}.get(value, value))
    except (ValueError, RecursionError):
        return str(value)
    # A number that would be written otherwise is a text that looks like one, as 007 and 1e5 are.
    is_same = isinstance(meaning, bool | list | dict) or (
        isinstance(meaning, int | float) and math.isfinite(meaning) and str(meaning) == value
    )
    return meaning if is_same else str(value)


def _decoded(value: Any) -> Any:
    """A list or mapping that is given as JSON text, as tables keep them; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return decoded if isinstance(decoded, list | dict) else value


def _check_columns(shape: _Shape) -> None:
    """Refuses what a row has beside its shape and nothing here would read."""
    row = {column: value for column, value in shape.row.items() if column not in {*shape.used, *shape.columns.values()}}
    for column in MEDIA:
        if row.get(column) not in (None, "", [], ()):
            raise DataError(f"column {column!r} holds what is no text, and models are trained on text alone")
    label = next((name for name in ("labels", "label") if row.get(name) is not None), None)
    if label is not None and shape.has("completions"):
        raise DataError(
            f"{label} beside completions (of steps of an answer?) is not read; give rewards, one per answer"
        )
    weight = _number(shape.row.get("weight") if "weight" in row else None)
    if weight == 0:
        raise WithoutWeight("its weight is 0")
    if weight is not None and weight != 1:
        raise DataError(
            f"its weight is {weight:g}, and rows count alike here: 1, or 0 for one to leave out. If the column means "
            "something else, give it another name"
        )
    if shape.has("chosen") and shape.has("rejected"):
        for chosen, rejected in _score_pairs(shape.row):
            if chosen < rejected:
                raise DataError(
                    f"its scores contradict its order: chosen has {chosen:g} and rejected {rejected:g}, which is better"
                )


def _score_pairs(row: Row) -> list[tuple[float, float]]:
    pairs = ((_number(row.get(chosen)), _number(row.get(rejected))) for chosen, rejected in SCORES)
    return [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]


def _number(value: Any) -> float | None:
    """A number, also as text, as tables have it; None if it is none."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _shaped(shape: _Shape, origin: str) -> Group:
    if shape.has("chosen") and shape.has("rejected"):
        prompt, answers = _preference(shape)
        rewards: list[float | None] = [1.0, 0.0]
        if answers[0] == answers[1]:
            raise DataError("chosen and rejected are the same")
    elif shape.has("completions"):
        prompt, answers = shape.prompt(), _answers(shape.listed("completions"), "completions")
        if not answers:
            raise DataError("completions is empty")
        rewards = _rewards(shape, len(answers))
    elif shape.has("completion"):
        prompt, answers = shape.prompt(), [_answer(shape.value("completion"), "completion")]
        rewards = [_label(shape)] if shape.has("label") or not shape.has("rewards") else _rewards(shape, 1)
    elif shape.has("chosen") or shape.has("rejected"):
        raise DataError(f"field {'rejected' if shape.has('chosen') else 'chosen'!r} is missing")
    elif shape.has("messages"):
        turns = _messages(shape.listed("messages"), "messages")
        turns = _after(shape.prompt(), turns) if shape.has("prompt") and turns else turns
        if not shape.has("label"):
            return _conversation(turns, origin, _truncations(shape, 1)[0])
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise DataError("a label is about the assistant's turn at the end of messages, and there is none")
        prompt, answers, rewards = turns[:-1], [turns[-1]], [_label(shape)]
    elif shape.has("text"):
        if "text" not in shape.columns and (column := _of_a_tree(shape.row)) is not None:
            raise DataError(
                f"a text with a {column!r} is one message of a conversation, and rows here are whole ones; join them "
                "to messages, or say columns: {text: text} to learn every message as plain text"
            )
        text = Message(role="assistant", content=_string(shape.value("text"), "text"))
        prompt, answers, rewards = "", [text], [None]
    elif shape.has("prompt") or shape.is_alpaca:
        prompt, answers, rewards = shape.prompt(), [], []
    else:
        raise DataError(
            f"has none of the known fields; its columns are {', '.join(map(repr, shape.row)) or 'none'}. Say by "
            "data.columns what they are, as {prompt: question, completion: answer}"
        )
    if any(_is_empty(answer) for answer in answers):
        raise DataError("an answer is empty")
    completions = tuple(
        Completion(text=answer.content, fields=answer.fields, reward=reward, truncated=truncated or answer.truncated)
        for answer, reward, truncated in zip(answers, rewards, _truncations(shape, len(answers)), strict=True)
    )
    return Group(id=origin, prompt=prompt, completions=completions)


def _of_a_tree(row: Row) -> str | None:
    """Column by which a row's text is one message of a conversation; None if there is none."""
    is_message = str(row.get("role") or "").strip().lower() in ROLES
    return "role" if is_message else next((column for column in TREE if column in row), None)


def _with_system(prompt: Prompt, shape: _Shape) -> Prompt:
    """The prompt with the row's system text, if it has one, as its first turn.

    Raises:
        DataError: plain text has no such turn, or the messages begin with another one.
    """
    column = shape.system_column()
    system = _string(shape.cell(column), column) if column is not None else ""
    if not system.strip() or not prompt:
        return prompt
    if isinstance(prompt, str):
        raise DataError(
            f"column {column!r} holds a system text, and a prompt of plain text has no turn for it; set prompt_as to "
            f"user_message, or write it into prompt_template as {{{column}}}"
        )
    if prompt[0].role not in ("system", "developer"):
        return (Message(role="system", content=system), *prompt)
    if prompt[0].content != system:
        raise DataError(f"column {column!r} holds another system text than the messages begin with")
    return prompt


def _tools(shape: _Shape) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call: a list of JSON schemas, or the text of one."""
    tools = shape.value("tools") if shape.has("tools") else ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "[]")
        except ValueError as error:
            raise DataError(f"tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of JSON schemas, not {tools!r:.50}")
    return tuple(_function(_present(tool, "tools")) for tool in tools)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI and chat templates have it; LLaMA-Factory gives the function alone."""
    is_bare = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if is_bare else tool


def _template_kwargs(shape: _Shape) -> Mapping[str, Any]:
    """What the row tells its chat template besides: a mapping, or the text of one; what is null counts as absent."""
    kwargs = _decoded(shape.value("chat_template_kwargs")) if shape.has("chat_template_kwargs") else {}
    if not isinstance(kwargs, dict) or not all(map(is_template_variable, kwargs)):
        raise DataError(f"chat_template_kwargs must be a mapping of a chat template's variables, not {kwargs!r:.60}")
    present: Mapping[str, Any] = _present(kwargs, "chat_template_kwargs")
    return present


def _truncations(shape: _Shape, count: int) -> list[bool]:
    """Whether each answer was cut off where it was sampled, by `finish_reason` or `truncated`, of one or of each."""
    for field in ("truncated", "finish_reason", "finish_reasons", "stop_reason"):
        if not shape.has(field):
            continue
        value = _decoded(shape.value(field))
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise DataError(f"{field} must be a list of {count}, one per answer, not of {len(values)}")
        cuts = [_is_cut_off(value, field) for value in values]
        if count > 1 and any(cuts) and not isinstance(value, list | tuple):
            raise DataError(f"{field} is {value!r}, which does not say of which of the {count} answers; give a list")
        return cuts
    return [False] * count


def _is_cut_off(value: Any, field: str) -> bool:
    if value is None or (field == "truncated" and value in (0, 1)):
        return bool(value)
    if field != "truncated" and isinstance(value, str):
        return value.lower() in CUT_OFF
    if field == "stop_reason" and isinstance(value, int):
        return False
    raise DataError(f"{field} must be {'true or false' if field == 'truncated' else 'a string'}, not {value!r:.50}")


class _Shape:
    """A row seen through `columns` and `prompt_template`."""

    def __init__(self, row: Row, source: SourceConfig) -> None:
        stack_exchange = {"question", *STACK_EXCHANGE.values()} <= row.keys() and not source.columns
        self.row = row
        self.columns = STACK_EXCHANGE if stack_exchange else source.columns
        self.template = source.prompt_template or (STACK_EXCHANGE_PROMPT if stack_exchange else None)
        self.as_message = source.prompt_as == "user_message"
        self.used = {*source.keep, *columns_of(self.template or "")}
        for field, column in source.columns.items():
            _cell(row, column, f"column {column!r} (columns.{field})")

    @property
    def is_alpaca(self) -> bool:
        """Whether the row is an instruction, with nothing else that says what the prompt is."""
        return isinstance(self.row.get("instruction"), str) and not any(map(self.has, ("prompt", "messages")))

    def has(self, field: str) -> bool:
        if field == "prompt" and self.template is not None:
            return True
        return self.value(field) is not None

    def listed(self, field: str) -> Any:
        """The value of a field that is a list, also where it is given as JSON text."""
        value = _decoded(self.value(field))
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            raise DataError(f"{field} is a text that is not JSON: {value!r:.50}. Write lists as json.dumps writes them")
        return value

    def value(self, field: str) -> Any:
        """What a field holds; None if there is none."""
        if field in self.columns:
            return _cell(self.row, self.columns[field], field)
        value = next((self.row[name] for name in ALIASES.get(field, (field,)) if self.row.get(name) is not None), None)
        if value is None and field in ALPACA and "instruction" in self.row:
            return next((self.row[name] for name in ALPACA[field] if self.row.get(name) is not None), None)
        return value

    def system_column(self) -> str | None:
        """Column of the system text, unless there is none or the prompt's template writes it already."""
        names = [self.columns["system"]] if "system" in self.columns else ["system", "system_prompt"]
        written = columns_of(self.template) if self.template is not None else set()
        return next((name for name in names if self.cell(name) is not None and name not in written), None)

    def cell(self, column: str) -> Any:
        """What a column holds; None if there is none."""
        try:
            return _cell(self.row, column, column)
        except DataError:
            return None

    def prompt(self) -> Prompt:
        if self.template is not None:
            return self._as_configured(_fill(self.template, self.row))
        if not self.has("prompt") and self.has("messages"):
            return self._turns("messages")
        if self.is_alpaca:
            return self._instruction()
        if not self.has("prompt"):
            raise DataError("field 'prompt' is missing")
        value = _as_turns(self.value("prompt"))
        return self._as_configured(_string(value, "prompt")) if isinstance(value, str) else self._turns("prompt")

    def _turns(self, field: str) -> tuple[Message, ...]:
        turns = _messages(self.listed(field), field)
        if not turns:
            raise DataError(f"{field} is an empty list of messages")
        return turns

    def _instruction(self) -> Prompt:
        """Alpaca's prompt: the instruction, and what it is about; earlier turns where there is a `history`."""
        instruction = _string(self.row["instruction"], "instruction")
        about = _string(self.value("input") or "", "input")
        history = _decoded(self.row.get("history")) or []
        if self.as_message:
            asked = Message(role="user", content="\n".join(filter(str.strip, (instruction, about))))
            return (*_history(history), asked)
        if history:
            raise DataError("history holds earlier turns, which plain text has not; set prompt_as to user_message")
        has_input = bool(about.strip())
        return ALPACA_PROMPT.format(
            with_input=", paired with an input that provides further context" if has_input else "",
            instruction=instruction,
            input=f"### Input:\n{about}\n\n" if has_input else "",
        )

    def _as_configured(self, text: str) -> Prompt:
        return (Message(role="user", content=text),) if self.as_message else text


def _history(pairs: Any) -> list[Message]:
    """Earlier turns as LLaMA-Factory has them: pairs of what the user said and what the assistant did."""
    pairs = pairs if isinstance(pairs, list | tuple) else [pairs]
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise DataError("history must be a list of pairs: what the user said, and what the assistant answered")
    roles = ("user", "assistant")
    return [
        Message(role=role, content=_string(text, "history"))
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


class _Template(string.Formatter):
    """Braces hold a column's name, dots and all."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def columns_of(template: str) -> set[str]:
    """Names of the columns that a prompt's template writes."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _fill(template: str, row: Row) -> str:
    cells = {name: _cell(row, name, f"column {name!r} of the prompt template") for name in sorted(columns_of(template))}
    return _Template().vformat(template, (), {name: _string(cell, name) for name, cell in cells.items()})


def _preference(shape: _Shape) -> tuple[Prompt, list[Message]]:
    values = [_as_turns(shape.value("chosen")), _as_turns(shape.value("rejected"))]
    if len({isinstance(value, str) for value in values}) > 1:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise DataError(f"chosen and rejected must be both strings or both lists of messages, not {kinds}")
    has_prompt = shape.has("prompt") or shape.is_alpaca
    if isinstance(values[0], str):
        chosen, rejected = (_string(value, field) for value, field in zip(values, ("chosen", "rejected"), strict=True))
        if has_prompt or shape.has("messages"):
            return shape.prompt(), [Message(role="assistant", content=text) for text in (chosen, rejected)]
        return _shared_beginning(_transcript(chosen, "chosen"), _transcript(rejected, "rejected"))
    chosen_turns, rejected_turns = _messages(values[0], "chosen"), _messages(values[1], "rejected")
    if len(chosen_turns) == len(rejected_turns) == 1 or has_prompt:  # else `messages` may be the chosen one again
        chosen_turns, rejected_turns = (_after(shape.prompt(), turns) for turns in (chosen_turns, rejected_turns))
    return _shared_beginning(chosen_turns, rejected_turns)


def _after(prompt: Prompt, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The whole conversation: turns that go on from the prompt, or that begin with it already.

    Raises:
        DataError: they begin with something else, so that one of the two would not be what was answered.
    """
    opening = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
    if not turns or turns[0].role == "assistant":
        return (*opening, *turns)
    if turns[: len(opening)] == opening:
        return turns
    if opening[0].role == "system" and turns[: len(opening) - 1] == opening[1:]:
        return (opening[0], *turns)
    if [turn.role for turn in opening] == ["user"]:  # a text, which sets of several turns take from any of them
        asked = ["", *(turn.content.strip() for turn in turns if turn.role == "user")]
        if opening[0].content.strip() in asked:
            return turns
    raise DataError("prompt is not what the list of messages begins with; take the wrong one of them out of the row")


def _as_turns(value: Any) -> Any:
    """Messages as a list: also one alone, and those that are given as JSON text. Any other text stays a text.

    Raises:
        DataError: it is the text of a list that Python printed, which is no JSON.
    """
    turns = _decoded(value)
    if isinstance(turns, dict):
        turns = [turns]
    if isinstance(value, str) and not (isinstance(turns, list) and turns and all(map(_is_message, turns))):
        if re.match(r"\s*\[\{'(role|content|from|value)':", value):
            raise DataError(
                f"holds a list as Python prints it, {value!r:.50}, which is no JSON; write it by json.dumps"
            )
        return value
    return turns


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())


def _transcript(text: str, field: str) -> tuple[Message, ...]:
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise DataError(
            f"without a prompt, {field} must be a message list or a '\\n\\nHuman: … Assistant: …' transcript"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[speaker], content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _shared_beginning(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], list[Message]]:
    for turns, field in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{field} does not end with an assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected do not share their prompt")
    if len(chosen) == 1:
        raise DataError("chosen and rejected hold no turn before the answer")
    return chosen[:-1], [chosen[-1], rejected[-1]]


def _conversation(turns: tuple[Message, ...], origin: str, truncated: bool) -> Group:
    """The prompt is everything before the first answer that is trained on. `truncated`: the last one was cut off."""
    # A conversation that the assistant opens is learned from its first reply on.
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index > 0]
    if not answers:
        raise DataError("messages hold no assistant's turn that answers something")
    if truncated:
        turns = (*turns[: answers[-1]], dataclasses.replace(turns[answers[-1]], truncated=True))
    answers = [index for index in answers if turns[index].trained]
    if not answers:
        raise DataError("messages hold no assistant's turn that is to be trained on: each has a weight of 0")
    first, last = answers[0], answers[-1]
    if any(_is_empty(turns[index]) for index in answers):
        raise DataError("an answer is empty")
    answer = Completion(
        text=turns[first].content,
        fields=turns[first].fields,
        truncated=turns[first].truncated,
        following=turns[first + 1 : last + 1],
    )
    return Group(id=origin, prompt=turns[:first], completions=(answer,))


def _is_empty(answer: Message) -> bool:
    return not answer.content.strip() and not answer.fields.get("tool_calls")


def _rewards(shape: _Shape, count: int) -> list[float | None]:
    if not shape.has("rewards"):
        return [None] * count
    rewards = shape.listed("rewards")
    if shape.has("completion") and not isinstance(rewards, list | tuple):  # of one answer, one number
        rewards = [_number(rewards) if isinstance(rewards, str) else rewards]
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise DataError(f"rewards must be a list of {count} numbers, one per completion")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= FLT_MAX:
            raise DataError(f"reward {reward!r:.50} is not a finite number")
    return [float(reward) for reward in rewards]


def _label(shape: _Shape) -> float | None:
    if not shape.has("label"):
        return None
    label = shape.value("label")
    known = LABELS.get(re.sub(r"[\s-]+", "_", label.strip().lower()), label) if isinstance(label, str) else label
    if known not in (0, 1):  # True and False are 1 and 0
        raise DataError(
            f"label must be true or false, not {label!r}; ratings in another unit go into a column `rewards`"
        )
    return float(known)


def _answer(value: Any, field: str) -> Message:
    """A completion given as a string or as a list with one assistant message."""
    value = _as_turns(value)
    if isinstance(value, str):
        return Message(role="assistant", content=_string(value, field))
    turns = _messages(value, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"{field} must be a string or one assistant message")
    return turns[0]


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        wanted = "a list of messages" if field == "messages" else "a string or a list of messages"
        kind = "a string" if isinstance(value, str) else type(value).__name__
        raise DataError(f"{field} must be {wanted}, not {kind}")
    return tuple(_message(turn, field) for turn in value)


def _message(turn: Any, field: str) -> Message:
    """One message with all its fields; a field that is null counts as absent, as tables fill in what a row lacks.

    Raises:
        DataError: it is none, or a field cannot be read.
    """
    turn = _of_sharegpt(turn) if isinstance(turn, dict) and {"from", "value"} <= turn.keys() else turn
    calls = turn.get("tool_calls") or turn.get("function_call") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or "role" not in turn or not ("content" in turn or calls):
        raise DataError(f"{field} holds something that is not a message with role and content")
    fields = {name: value for name, value in turn.items() if value is not None and name not in ("role", "content")}
    weights = [_weight(fields.pop(name), name) for name in WEIGHTS if name in fields]
    if any(fields.get(name) for name in PARTS_TRAINED):
        raise DataError("a message says which parts of it are trained on, and here it is trained on or not: use weight")
    cuts = [_is_cut_off(fields.pop(name), name) for name in FINISH_REASONS if name in fields]
    content = turn.get("content")
    return Message(
        role=_role(turn["role"], f"{field} role"),
        content="" if content is None and calls else _content(content, f"{field} content"),
        fields=_present(fields, field),
        trained=all(weights),
        truncated=any(cuts),
    )


def _of_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's form, `{from, value}`, as a message. A call of a function is the JSON text of the call."""
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if str(turn["from"]).lower() != "function_call":
        return {"role": turn["from"], "content": turn["value"], **others}
    calls = _decoded(turn["value"])
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f"a function_call must be the JSON of a name and arguments, not {turn['value']!r:.50}")
    functions = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions, **others}


def _role(value: Any, field: str) -> str:
    """Who speaks, in the words of chat templates; a speaker that is not known stays, for the template to judge."""
    role = _string(value, field)
    return ROLES.get(role.strip().lower(), role)


def _weight(value: Any, name: str) -> bool:
    known = LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if known not in (0, 1):  # True and False are 1 and 0
        raise DataError(f"a message's {name} must be 0 or 1 (not trained on, or trained on), not {value!r:.50}")
    return bool(known)


def _content(value: Any, field: str) -> str:
    """A text, or the text of a list of parts."""
    if not isinstance(value, list | tuple) or not value:
        return _string(value, field)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{field} holds a part of type {kind!r:.50}; only parts of type 'text' can be trained on")
    return "".join(_string(part.get("text"), field) for part in value)


def _present(value: Any, field: str) -> Any:
    """A field as it stands, without what is null in it: tables give every mapping the keys of all rows.

    Raises:
        DataError: a text in it cannot be read by any tokenizer.
    """
    if isinstance(value, dict):
        return {key: _present(item, field) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_present(item, field) for item in value]
    return _string(value, field) if isinstance(value, str) else value


def _answers(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{field} must be a list, not {type(value).__name__}")
    return [_answer(item, field) for item in value]


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field} holds a lone surrogate at character {error.start}, which no tokenizer can read"
        ) from error
    return value
