"""The one way in which a number out of range is reported by the rules."""

from __future__ import annotations

from kfac_dist.errors import InvalidSpecError


def check_interval(name: str, value: float, low: float, high: float | None = None) -> None:
    """Accept `value` in the closed interval [low, high]; without `high`, from `low` on.

    Raises:
        InvalidSpecError: `value` is outside, or NaN; the message names both.
    """
    if high is None:
        if not value >= low:
            raise InvalidSpecError(f"{name} must be at least {low}; got {value}")
    elif not low <= value <= high:
        raise InvalidSpecError(f"{name} must be between {low} and {high}; got {value}")
