"""Which inverses may precondition a step?

The staleness bound of docs/algorithm.md#asynchrony is enforced here and nowhere else. The *version*
of an inverse is the step of the newest statistics in it. Its `inverse_staleness_steps` in a step is
that step minus the version.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from kfac_dist.coordination.checks import check_interval
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.recorded import BeyondBound, RecordedInverses

AtBound = Literal["wait", "damp"]


@dataclass(frozen=True, kw_only=True)
class StalenessBound:
    """How old an inverse may be."""

    max_steps: int
    """The largest staleness that is admitted; 0 makes the run synchronous. A synchronous step uses
    the versions of the last scheduled refresh, of that step itself if a refresh is due in it."""
    warmup_steps: int
    """How many steps at the start are synchronous."""
    schedule: StepSchedule
    delay_steps: Mapping[str, int] = field(default_factory=dict)
    """Scripts an asynchronous run: by pattern of layer names, how many steps late a refresh is
    used. The last pattern that matches a layer counts."""
    recorded: RecordedInverses | None = None
    """Makes every step use what a recorded run used, and overrides the rest."""

    def __post_init__(self) -> None:
        check_interval("staleness.max_steps", self.max_steps, 0)
        check_interval("staleness.warmup_steps", self.warmup_steps, 0)
        for pattern, delay in self.delay_steps.items():
            check_interval(f"staleness.delay_steps.{pattern}", delay, 0)

    def is_exact(self, step: int) -> bool:
        """Return whether `step` must use exactly one version of each layer, and no newer one."""
        if self.recorded is not None or self.max_steps == 0:
            return True
        return step <= self.warmup_steps or bool(self.delay_steps)

    def oldest_admissible(self, step: int, layer: str) -> int:
        """Return the oldest version that may precondition a layer in `step`, counted from 1.

        In an exact step it is the only one; it is 0 if a recorded step used none.
        """
        check_interval("step", step, 1)
        if self.recorded is not None:
            return self.recorded.version(step, layer)
        if not self.is_exact(step):
            return max(1, step - self.max_steps)
        # Without the last term, the first step after the warm-up would use an older version than
        # the step before it.
        synchronous_until = min(step, self.warmup_steps)
        return self.schedule.last_refresh(max(1, step - self._delay(layer), synchronous_until))

    def only_admissible(self, step: int, layers: Collection[str]) -> dict[str, int] | None:
        """Return the only version of each layer that `step` may use, None if the step is not exact.

        A layer is left out if a recorded step used no inverse for it.
        """
        if not self.is_exact(step):
            return None
        oldest = {layer: self.oldest_admissible(step, layer) for layer in layers}
        return {layer: version for layer, version in oldest.items() if version}

    def next_exact_refresh(self, step: int) -> int | None:
        """Return the next refresh after `step`, None if that step is not exact."""
        if self.recorded is not None:
            return self.recorded.next_refresh(step)
        refresh = self.schedule.next_refresh(step)
        return refresh if self.is_exact(refresh) else None

    def _delay(self, layer: str) -> int:
        matching = [
            delay for pattern, delay in self.delay_steps.items() if fnmatchcase(layer, pattern)
        ]
        return matching[-1] if matching else 0


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What the parameter server does with the layers whose inverse is not within the bound.

    All other layers use the inverse that they have. The server counts `damp`, `degraded` and
    `gradient` when the step is applied.
    """

    wait_for: tuple[str, ...] = ()
    """The step waits until a newer inverse of these layers has come, and then decides again."""
    damp: tuple[str, ...] = ()
    """Their stale inverse is used with heavier damping."""
    degraded: tuple[str, ...] = ()
    """Their stale inverse is used unchanged, because nobody can refresh it now."""
    gradient: tuple[str, ...] = ()
    """They have no inverse and nobody can make one now: their direction is the gradient."""

    @property
    def stale(self) -> tuple[str, ...]:
        """The layers whose inverse is beyond the bound and is used nevertheless."""
        return self.damp + self.degraded

    @property
    def beyond_bound(self) -> dict[str, BeyondBound]:
        """How the inverse of each of the `stale` layers is used."""
        damped: dict[str, BeyondBound] = dict.fromkeys(self.damp, "damp")
        return damped | dict.fromkeys(self.degraded, "degraded")


def admit(
    step: int,
    versions: Mapping[str, int | None],
    bound: StalenessBound,
    at_bound: AtBound,
    orphaned: Collection[str] = (),
    *,
    failed: Collection[str] = (),
    accepted_statistics: Sequence[int] | None = None,
) -> Admission:
    """Decide for each layer whether its newest inverse may precondition `step`.

    The step waits for a layer beyond the bound, or damps it if `at_bound` is "damp". An exact step
    damps none, and a layer without an inverse cannot be damped. A repeated step has the same layers
    beyond the bound as the recorded one.

    Args:
        step: the step, counted from 1.
        versions: the version of the newest available inverse of each layer, None before the first.
        bound: the staleness bound.
        at_bound: what to do with a layer beyond the bound.
        orphaned: layers whose inverse worker is being replaced. Only an exact step waits for them:
            the new worker makes the exact version, too.
        failed: layers whose version nobody can make, because their inversion failed or their
            statistics are lost. No step waits for them.
        accepted_statistics: the steps whose statistics were accepted, ascending, None if unknown.
            An inverse cannot be newer than the last of them, and in an exact step not newer than
            the last that the exact version may contain. So the step does not wait for a newer one.
    """
    may_damp = at_bound == "damp" and not bound.is_exact(step)
    decided: dict[str, list[str]] = {"wait_for": [], "damp": [], "degraded": [], "gradient": []}
    recorded = bound.recorded.beyond_bound.get(step, {}) if bound.recorded else {}
    for name, version in versions.items():
        oldest = bound.oldest_admissible(step, name)
        if (version or 0) >= oldest:
            if name in recorded:
                decided[recorded[name]].append(name)
            continue
        exhausted = accepted_statistics is not None and (
            _newest(accepted_statistics, oldest if bound.is_exact(step) else None) <= (version or 0)
        )
        left = name in orphaned and not bound.is_exact(step)
        if left or name in failed or exhausted:
            outcome = "gradient" if version is None else "degraded"
        else:
            outcome = "damp" if may_damp and version is not None else "wait_for"
        decided[outcome].append(name)
    return Admission(**{outcome: tuple(names) for outcome, names in decided.items()})


def degraded_too_long(
    step: int,
    versions: Mapping[str, int],
    bound: StalenessBound,
    orphaned: Collection[str],
    max_degraded_steps: int | None,
) -> dict[str, int]:
    """Return the orphaned layers for whose new inverse worker `step` must wait.

    The value of each is how many steps beyond the bound its inverse would be.

    Args:
        step: the step that is to be ordered.
        versions: the version of each layer's inverse in use; a layer without one is left out, and
            counts as version 0.
        bound: the staleness bound; a repeated step does what the recorded one did.
        orphaned: the layers whose inverse worker is being replaced.
        max_degraded_steps: how many steps beyond the bound an inverse may be; None for any number.
    """
    if max_degraded_steps is None or bound.recorded is not None:
        return {}
    beyond = {
        layer: bound.oldest_admissible(step, layer) - versions.get(layer, 0) for layer in orphaned
    }
    return {layer: steps for layer, steps in beyond.items() if steps > max_degraded_steps}


def _newest(steps: Sequence[int], at_most: int | None) -> int:
    """Return the last of ascending steps that is at most `at_most`, 0 without any."""
    number = len(steps) if at_most is None else bisect_right(steps, at_most)
    return steps[number - 1] if number else 0
