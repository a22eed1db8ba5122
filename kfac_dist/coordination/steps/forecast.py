"""How stale inverses will be, from the times that a step and a refresh take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfac_dist.coordination.checks import check_interval


@dataclass(frozen=True, kw_only=True)
class StalenessForecast:
    """Staleness of the inverses in use, in steps, once the run is under way.

    `waits` is whether training will stand still at the bound, as an inverse worker is slower than
    the bound allows.
    """

    mean: float
    max: int
    waits: bool


def forecast_staleness(
    step_seconds: float, refresh_seconds: float, period: int, max_steps: int
) -> StalenessForecast:
    """Forecast the staleness of an inverse that is refreshed every `period` steps.

    A refresh takes `refresh_seconds` on the slowest inverse worker, while steps go on; one that
    takes longer than the period is followed by the next at once. An inverse is as old as its
    refresh took when it comes into use, and a period older when the next one comes.
    `max_steps` is the bound; 0 is a synchronous run, which waits for every refresh.
    """
    check_interval("step_seconds", step_seconds, 0)
    check_interval("refresh_seconds", refresh_seconds, 0)
    if max_steps == 0:
        return StalenessForecast(mean=(period - 1) / 2, max=period - 1, waits=True)
    late = math.ceil(refresh_seconds / step_seconds) if step_seconds > 0 else 0
    between = max(period, late)
    oldest = late + between - 1
    mean = late + (between - 1) / 2
    waits = oldest > max_steps
    return StalenessForecast(mean=min(mean, max_steps), max=min(oldest, max_steps), waits=waits)
