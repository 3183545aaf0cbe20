"""The `data:` section: where rows come from, and what is read from them."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from alignment.passwords import holds_password
from alignment.settings.explain import nearest
from alignment.settings.plugins import load_function
from alignment.settings.section import Count, Fraction, NonNegative, PositiveCount, Section, as_value_error

FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "completions", "rewards", "label", "messages", "text"),
    *("system", "tools", "chat_template_kwargs", "finish_reason", "truncated"),
)
"""What `columns` can name: the fields of the shapes that `alignment.data.shapes` reads."""


COLUMN = re.compile(r"(?!\d+$)[^\[\]{}!:]+")
"""A name that braces can hold, with dots for what is inside a column."""


FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""A dotted name of one's own, as `package.module:function`. The id of a set on the hub has no colon."""


def is_function_name(path: str) -> bool:
    """Whether a `data.path` is the dotted name of a function of one's own, and not that of a file."""
    return FUNCTION.fullmatch(path) is not None and not Path(path).exists()


class SourceConfig(Section):
    """One source of rows: a file, a folder, a hub id, or what people said to an endpoint."""

    path: str | None = None
    """A `.jsonl`, `.json`, `.csv` or `.tsv` file (each also as `.gz`, `.bz2`, `.xz` or `.zst`), a `.parquet` file, a
    folder of such files or of `datasets`' save_to_disk, a pattern as `data/*.jsonl`, a hub id, or a dotted
    `package.module:function` of one's own, which is called with this section and returns an iterable of rows.
    What people said to an endpoint is read from its `http(s)://HOST/v1/feedback/export` (as the administrator whose
    key is in $RAYLIGN_KEY; with `?since=jdg-7`, what came after that; with `?model=NAME`, that of one of several
    models) or from its database, `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`. It grows, so a run writes
    it into its folder when it begins, and reads that ever after: a resume goes on with the rows that the run began
    with."""
    name: str | None = None
    """Configuration name of a hub dataset, or of a folder that is a copy of one."""
    data_dir: str | None = None
    """Folder inside a hub dataset or a folder, such as `data/rl`."""
    split: str = "train"
    """Split of a hub dataset, or of a folder whose files' names say one, as `test.jsonl`, `train/a.jsonl` and
    `train-00000-of-00001.parquet` do; several are `train+test`. A folder whose names say none is all `train`."""
    fraction: Fraction = 1.0
    """Fraction of the groups to use, 0 to 1, taken from the front after `shuffle`; while streaming, the probability of
    using each, which is the same in every epoch."""
    skip: Count = 0
    """Rows to leave out at the front."""
    take: PositiveCount | None = None
    """Rows to read at most; None reads all."""
    streaming: bool = False
    """Read while training instead of before it: for sets that do not fit into memory."""
    weight: NonNegative = 1.0
    """How often a group is drawn from this source of a streaming mixture, beside the weights of the others. Without
    streaming every group of a mixture is used once per epoch, and `weight` is read as the `fraction`, as which
    it was known."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column stands for which field, as `{chosen: response_j, rejected: response_k}`. Fields: prompt, chosen,
    rejected, completion, completions, rewards, label, messages, text, system, tools, chat_template_kwargs,
    finish_reason, truncated. Dots reach into a column, as `{completion: answer.text}`."""
    prompt_template: str | None = None
    """Text of the prompt with columns in braces, as `"Question: {question}\\n\\nAnswer: "`; dots reach into a column.
    None reads a column."""
    shape: Annotated[str, Field(json_schema_extra={"pattern": ":"})] | None = None
    """A dotted `package.module:function` of one's own that reads every row: it is called with the row, a mapping, and
    returns an `alignment.groups.Group`, the columns of which scorers get beside those of `keep`. `columns`,
    `prompt_template` and `prompt_as` mean nothing then. None finds out by the names of the columns."""
    keep: tuple[str, ...] = ()
    """Columns that are handed to the scorers as they are, such as `answer` for one that knows the right one; dots reach
    into a column, as `reward_model.ground_truth`."""
    prompt_as: Literal["text", "user_message"] = "text"
    """What a prompt that is a string means: `text` is continued as it stands, `user_message` goes through the chat
    template as the user's turn."""

    @field_validator("path")
    @classmethod
    def _holds_no_password(cls, path: str | None) -> str | None:
        if path is not None and holds_password(path):
            raise ValueError("must hold no password, for it is kept with the run; PGPASSWORD or ~/.pgpass may")
        return path

    @field_validator("path")
    @classmethod
    def _known_function(cls, path: str | None) -> str | None:
        if path is not None and is_function_name(path):
            with as_value_error():
                load_function(path, "source")
        return path

    @field_validator("shape")
    @classmethod
    def _known_shape(cls, shape: str | None) -> str | None:
        if shape is not None:
            with as_value_error():
                load_function(shape, "shape")
        return shape

    @field_validator("weight")
    @classmethod
    def _draws_from_a_stream(cls, weight: float, info: ValidationInfo) -> float:
        if weight > 1 and not info.data.get("streaming"):
            raise ValueError("above 1 it says how often a stream is drawn from; set streaming, or give a fraction")
        return weight

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for field in columns:
            if field not in FIELDS:
                raise ValueError(f"there is no field {field!r}{nearest(field, FIELDS)}")
        return columns

    @field_validator("prompt_template")
    @classmethod
    def _well_formed(cls, template: str | None) -> str | None:
        try:
            fields = [(name, form, cast) for _, name, form, cast in string.Formatter().parse(template or "")]
        except ValueError as error:
            raise ValueError(f"braces must hold the name of a column ({error})") from error
        for name, form, cast in fields:
            if name is not None and (not COLUMN.fullmatch(name) or form or cast):
                raise ValueError(f"braces must hold the name of a column, as {{question}}, not {name!r}")
        return template


WHICH_ROWS = ("path", "name", "data_dir", "split", "fraction", "skip", "take", "streaming", "weight")
"""Keys of a source that say which rows it has; all others say how a row is read."""


class DataConfig(SourceConfig):
    """Where the preference data comes from and how it is cut to fit."""

    mixture: tuple[SourceConfig, ...] = ()
    """Several sources instead of one `path`. Without streaming all their groups are shuffled together. If one of them
    streams, every group is drawn from a source by `weight`; each goes on from its own place, and begins again when it
    ends."""
    eval: SourceConfig | None = None
    """Held-out rows for evaluation. They are read as the training rows are (`prompt_as`, `prompt_template`, `columns`,
    `keep`), unless it says otherwise; with a `split` alone it is that split of the same set. None cuts `eval_groups`
    from the training data."""
    eval_groups: Count = 0
    """Groups held out for evaluation: cut from the training data, by prompt, if `eval` is None; else the most that
    are used of `eval`, where 0 uses all."""
    hold_out_by: Literal["prompt", "first_turn"] = "prompt"
    """What held-out and training groups may not share: the whole prompt, or the first thing that the user says."""
    shuffle: bool = True
    """Visit groups in a new random order every epoch; false keeps the file's order."""
    shuffle_buffer: PositiveCount = 1000
    """Rows of each source held to shuffle from while streaming."""
    max_length: PositiveCount = 1024
    """Most tokens of prompt and one completion together. A longer completion is cut and gets no end token."""
    max_prompt_length: PositiveCount | None = None
    """Most tokens of a prompt; a longer one is cut as `truncate_prompt` says. None never cuts, so that a prompt of
    `max_length` tokens or more is a bad row."""
    truncate_prompt: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a long prompt survives."""
    max_characters: PositiveCount | None = None
    """Leave out rows with prompt + completion longer than this many characters, for any completion. None keeps all."""
    control_tokens: Literal["auto", "text", "control"] = "auto"
    """What the tokenizer's control tokens (`<|im_end|>`) are where they stand in the data's own texts. `text`: ordinary
    characters, so that no text ends its own turn. `control`: what they are in a template. `auto`: text in messages,
    whose control tokens the chat template writes; control in plain text, which has nobody else to write them."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too (plain language modelling); only for groups with one completion."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """`fail` stops at the first unusable row; `skip` leaves it out, counts it and names it in `bad_rows.jsonl`."""
    bad_row_budget: Fraction = 0.05
    """Largest fraction of bad rows that `skip` accepts, 0 to 1."""

    @model_validator(mode="before")
    @classmethod
    def _held_out_rows_are_read_alike(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("eval"), dict | SourceConfig):
            return values
        held_out = _settings(values["eval"])
        mixture = values.get("mixture")
        if held_out.get("path") is None and "split" in held_out and not mixture:  # another split of the same set
            held_out |= {key: values[key] for key in ("path", "name", "data_dir") if key in values}
        sources = [_settings(item) for item in mixture] if isinstance(mixture, list | tuple) and mixture else [values]
        for key, field in SourceConfig.model_fields.items():
            if key in WHICH_ROWS or key in held_out:
                continue
            settings = [source.get(key, field.get_default(call_default_factory=True)) for source in sources]
            if any(setting != settings[0] for setting in settings):
                raise ValueError(f"the sources of mixture differ in {key}, so eval must say which is its own")
            held_out[key] = settings[0]
        return {**values, "eval": held_out}

    @model_validator(mode="after")
    def _every_source_has_a_path(self) -> Self:
        if any(source.path is None for source in self.mixture):
            raise ValueError("a source of mixture has no path")
        if self.eval is not None and self.eval.path is None:
            raise ValueError("eval has no path; give it one, or a split of data.path that is not trained on")
        return self

    @model_validator(mode="after")
    def _weights_mean_something(self) -> Self:
        weighted_sources = self.sources if self.is_drawn else ()
        if weighted_sources and not any(source.weight != 0 for source in weighted_sources):
            raise ValueError("every weight of mixture is 0, so that no group is ever drawn")
        for source in (*self.sources, *([self.eval] if self.eval else [])):
            if source not in weighted_sources and source.weight != 1 and (source.fraction != 1 or source.weight > 1):
                raise ValueError(f"weight {source.weight:g} means nothing without a streaming mixture; take it away")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (not self.mixture):
            has_both = self.path is not None
            raise ValueError(
                "path and mixture are both given; set one of them to null"
                if has_both
                else "neither path nor mixture is given; say where the data is, e.g. data.path=pairs.jsonl"
            )
        unread_keys = [
            name
            for name, field in SourceConfig.model_fields.items()
            if self.mixture and getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        if unread_keys:
            raise ValueError(f"{unread_keys[0]} beside mixture is read by nothing; give it in the sources of mixture")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), "
                "or no token is left for the completion"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training sources, whether given as one path or as a mixture."""
        return self.mixture or (self,)

    @property
    def is_drawn(self) -> bool:
        """True if every group is drawn from one of several sources, by their weights."""
        return len(self.mixture) > 1 and any(source.streaming for source in self.mixture)

    def fraction_of(self, source: SourceConfig) -> float:
        """Fraction of a source's groups that is used."""
        is_drawn = self.is_drawn and source in self.mixture
        return source.fraction if is_drawn or source.weight == 1 else source.weight


def _settings(source: Any) -> dict[str, Any]:
    """What a source says, whether it is read already or not."""
    return source.model_dump(exclude_unset=True) if isinstance(source, SourceConfig) else dict(source)
