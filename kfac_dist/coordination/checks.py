"""Is a number in its legal range? The one place where the rules refuse it."""

from __future__ import annotations

from kfac_dist.errors import InvalidSpecError


def check_interval(name: str, value: float, low: float, high: float | None = None) -> None:
    """Check that `value` is in the closed interval [low, high], or at least `low` without `high`.

    Raises:
        InvalidSpecError: `value` is outside, or NaN; the message has the value and the interval.
    """
    if high is None:
        if not value >= low:
            raise InvalidSpecError(f"{name} must be at least {low}; got {value}")
    elif not low <= value <= high:
        raise InvalidSpecError(f"{name} must be between {low} and {high}; got {value}")
