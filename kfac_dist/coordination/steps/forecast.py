"""How stale will the inverses be, and how long a step, given the times that each part takes?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfac_dist.coordination.checks import check_interval


@dataclass(frozen=True, kw_only=True)
class StalenessForecast:
    """Staleness in steps of the inverses in use, after the first few refreshes.

    `waits`: steps will wait at the bound, because an inverse worker is too slow for it.
    """

    mean: float
    max: int
    waits: bool


def crowding(busy_threads: float, num_cpus: int) -> float:
    """Return how much longer a step takes because its processes share the cores; at least 1.

    The members of a step wait for each other, so the step is as late as the member that gets the
    least: with more busy threads than cores, everyone's share shrinks alike.

    Args:
        busy_threads: threads that compute during a step, on average.
        num_cpus: the cores that they share.
    """
    check_interval("busy_threads", busy_threads, 0)
    check_interval("num_cpus", num_cpus, 1)
    return max(1.0, busy_threads / num_cpus)


def forecast_staleness(
    step_seconds: float, refresh_seconds: float, period: int, max_steps: int
) -> StalenessForecast:
    """Forecast the staleness of an inverse that is refreshed every `period` steps.

    Steps continue during a refresh. If a refresh takes longer than the period, the next one follows
    at once. When an inverse comes into use it is as old as its refresh took; it grows older by a
    period until the next one replaces it.

    Args:
        step_seconds: the time of a step.
        refresh_seconds: the time of a refresh on the slowest inverse worker.
        period: steps from one refresh to the next.
        max_steps: the staleness bound; 0 is a synchronous run, which waits for every refresh.
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
