"""What all sections of the specification have in common, and the intervals they draw from.

A section checks itself when it is made. Relations between its keys are checked by a method that
returns problems as `key: text`; `raise_problems` hands them on, the key relative to the section.
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

    Types are strict: "100", 100.0 and true are three ways of not writing 100.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ValueError with all `problems`, a line each, if there are any."""
    text = "\n".join(problems)
    if text:
        raise ValueError(text)
