"""The base class of all sections of a specification, and the intervals of their numbers.

A section is checked when it is created. Where keys depend on each other, the section has a
validator that collects problems as `key: text`, the key relative to the section, and passes them
to `raise_problems`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen section; unknown keys, wrong types and non-finite numbers are refused.

    Types are strict: where 100 is expected, "100", 100.0 and true are all refused.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists all `problems`, one a line; do nothing without any."""
    text = "\n".join(problems)
    if text:
        raise ValueError(text)
