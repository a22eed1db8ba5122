"""What the deciding shard has decided, as the gradient workers mirror it.

The first shard's decisions exist nowhere else until the driver has its report. With each step it
tells the workers what came out of the step before, and the state from which this one is decided.
So if it dies, nothing is lost: the step in hand is repeated from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from workers.exchange.messages import StepDecision

_MOST_GAMMAS = 3
_GAMMAS = ("next_gammas", "open_search")
_NUMBERS = [field.name for field in fields(StepDecision) if field.name not in _GAMMAS]
_NO_STEP = -1.0

MIRROR_SIZE = 1 + len(_NUMBERS) + 3 * (1 + _MOST_GAMMAS) + 3
"""How many numbers a mirror consists of."""


@dataclass(frozen=True, kw_only=True)
class DecisionMirror:
    """The decision about `step`, None before the first, and the state after it.

    `damping`, `gamma`, `fisher_noise` and `search` are the state of `KFACUpdate`; they are 0 for a
    first-order optimizer.
    """

    step: int
    decision: StepDecision | None
    damping: float
    gamma: float
    fisher_noise: float
    search: tuple[float, ...]

    def numbers(self) -> list[float]:
        """Return the mirror as MIRROR_SIZE numbers."""
        step = float(self.step) if self.decision is not None else _NO_STEP
        decided = [_number(getattr(self.decision, name, None)) for name in _NUMBERS]
        next_gammas = self.decision.next_gammas if self.decision is not None else ()
        return [
            step,
            *decided,
            *_padded(next_gammas),
            *_padded(self.decision.open_search if self.decision is not None else ()),
            *_padded(self.search),
            self.damping,
            self.gamma,
            self.fisher_noise,
        ]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], last_step: int) -> DecisionMirror:
        """Return the mirror of these numbers; `last_step` is its step if nothing was decided."""
        left = iter(numbers)
        step = next(left)
        values = {name: next(left) for name in _NUMBERS}
        next_gammas, open_search, search = (_unpadded(left) for _ in range(3))
        decision = None
        if step != _NO_STEP:
            decision = _decision(values, next_gammas, open_search)
        return cls(
            step=last_step if decision is None else int(step),
            decision=decision,
            damping=next(left),
            gamma=next(left),
            fisher_noise=next(left),
            search=search,
        )


def _decision(
    values: dict[str, float], next_gammas: tuple[float, ...], open_search: tuple[float, ...]
) -> StepDecision:
    known = {name: None if math.isnan(value) else value for name, value in values.items()}
    # A loss may well be NaN; that is what a skipped step has.
    known |= {name: values[name] for name in ("loss", "objective")}
    known["applied"] = bool(values["applied"])
    for name in ("parameter_version", "num_cases", "refused_in_a_row"):
        known[name] = int(values[name])
    accepted = known["accepted_statistics"]
    known["accepted_statistics"] = None if accepted is None else bool(accepted)
    return StepDecision(**known, next_gammas=next_gammas, open_search=open_search)  # type: ignore[arg-type]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _padded(gammas: Sequence[float]) -> list[float]:
    return [float(len(gammas)), *gammas, *[0.0] * (_MOST_GAMMAS - len(gammas))]


def _unpadded(numbers: Iterator[float]) -> tuple[float, ...]:
    count = int(next(numbers))
    gammas = [next(numbers) for _ in range(_MOST_GAMMAS)]
    return tuple(gammas[:count])
