"""What every section of a configuration is: a frozen pydantic model, and the types of its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignment.errors import ConfigError
from alignment.settings.old_names import with_new_names

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
NumberFormat = Literal["auto", "bf16", "fp32"]
MAX_REWARD = 3.4e38
"""Largest absolute value of a reward, because rewards become fp32."""


def fit_fp32(number: float) -> float:
    """Returns a number that fp32 holds.

    Raises:
        ValueError: it is too large.
    """
    if abs(number) > MAX_REWARD:
        raise ValueError(f"Input should be a number within fp32, which ends at {MAX_REWARD:g}")
    return number


Fp32Number = Annotated[float, AfterValidator(fit_fp32)]


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are refused and every field's docstring reaches the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    is_run: ClassVar[bool] = False
    """True of a whole run, whose unknown keys may be those of another trainer."""

    @classmethod
    def section_class(cls, key: str, value: Any) -> type[Section]:
        """The class of the section under a key, of which `value` is what the file says."""
        return sections_of(cls.model_fields[key].annotation)[0]

    @model_validator(mode="before")
    @classmethod
    def _renames_old_keys(cls, values: Any) -> Any:
        """Accepts keys and values by the names of earlier releases."""
        return with_new_names(values, cls.model_fields) if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses `lr: yes` and `max_grad_norm: off`, which pydantic reads as the numbers 1 and 0."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and _is_number(field.annotation):
            raise ValueError("Input should be a number; on, off, yes, no, true and false are none")
        return value


@contextlib.contextmanager
def as_value_error() -> Iterator[None]:
    """Turns a ConfigError into a ValueError. Pydantic collects these, so that all problems of a file are told."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(str(error)) from error


def problem_of_key(kind: type[Section], key: str, problem: str, value: Any) -> ValidationError:
    """The error of a key's value that only the whole section shows to be wrong."""
    details = InitErrorDetails(
        type=PydanticCustomError("key", "{problem}", {"problem": problem}), loc=(key,), input=value
    )
    return ValidationError.from_exception_data(kind.__name__, [details])


def _is_number(annotation: Any) -> bool:
    """Whether a type is that of a number, perhaps with others beside it, and not of true and false."""
    kinds = {annotation, *get_args(annotation)}
    kinds |= {kind for alternative in kinds for kind in get_args(alternative)}
    return bool(kinds & {int, float}) and bool not in kinds


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections among the alternatives of a type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]
