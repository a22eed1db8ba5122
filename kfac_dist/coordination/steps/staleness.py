"""The staleness bound: which inverses may precondition a step (algorithm.md section 13).

This is the one place of the bound. The version of an inverse is the step of the newest statistics
in it; its `inverse_staleness_steps` in a step is that step minus the version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from kfac_dist.coordination.checks import check_interval
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.recorded import BeyondBound, RecordedInverses

AtBound = Literal["wait", "damp"]


@dataclass(frozen=True, kw_only=True)
class StalenessBound:
    """How old an inverse may be.

    `max_steps`: the largest admissible staleness; 0 makes the run synchronous, as do the first
    `warmup_steps` steps. A synchronous step uses what `schedule` last refreshed, in that step
    itself when a refresh is due. `delay_steps` scripts an asynchronous run: by patterns of layer
    names, of which the last that matches counts, how many steps late a refresh is used.
    `recorded` makes every step use what that run used, whatever the rest says.
    """

    max_steps: int
    warmup_steps: int
    schedule: StepSchedule
    delay_steps: Mapping[str, int] = field(default_factory=dict)
    recorded: RecordedInverses | None = None

    def __post_init__(self) -> None:
        check_interval("staleness.max_steps", self.max_steps, 0)
        check_interval("staleness.warmup_steps", self.warmup_steps, 0)
        for pattern, delay in self.delay_steps.items():
            check_interval(f"staleness.delay_steps.{pattern}", delay, 0)

    def is_exact(self, step: int) -> bool:
        """Tell whether `step` uses exactly one version of each layer, whatever else there is."""
        if self.recorded is not None or self.max_steps == 0:
            return True
        return step <= self.warmup_steps or bool(self.delay_steps)

    def oldest_admissible(self, step: int, layer: str) -> int:
        """Return the oldest version that may precondition a layer in `step`, counted from 1.

        Where `is_exact`, it is the only one; 0 where a recorded step used none.
        """
        check_interval("step", step, 1)
        if self.recorded is not None:
            return self.recorded.version(step, layer)
        if not self.is_exact(step):
            return max(1, step - self.max_steps)
        # The end of the warm-up does not make a version go back.
        synchronous_until = min(step, self.warmup_steps)
        return self.schedule.last_refresh(max(1, step - self._delay(layer), synchronous_until))

    def only_admissible(self, step: int, layers: Collection[str]) -> dict[str, int] | None:
        """Return the one version of each layer that `step` may use, None where newer ones do.

        A layer that a recorded step used none of is left out.
        """
        if not self.is_exact(step):
            return None
        oldest = {layer: self.oldest_admissible(step, layer) for layer in layers}
        return {layer: version for layer, version in oldest.items() if version}

    def next_exact_refresh(self, step: int) -> int | None:
        """Return the next refresh after `step`, None where its version need not be exact."""
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
    """What the parameter server does with the layers that are not within the bound.

    `wait_for`: the step may not go on before a newer inverse of these has come; decide again then.
    `damp`: their stale inverse is used with heavier damping. `degraded`: their stale inverse is
    used as it is, since nobody can refresh it now. `gradient`: they have no inverse and nobody can
    make one now; their direction is the gradient. The rest uses what it has. The server counts the
    last three when the step is applied.
    """

    wait_for: tuple[str, ...] = ()
    damp: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
    gradient: tuple[str, ...] = ()

    @property
    def stale(self) -> tuple[str, ...]:
        """The layers whose inverse is beyond the bound and is applied all the same."""
        return self.damp + self.degraded

    @property
    def beyond_bound(self) -> dict[str, BeyondBound]:
        """How each of the `stale` layers is used."""
        damped: dict[str, BeyondBound] = dict.fromkeys(self.damp, "damp")
        return damped | dict.fromkeys(self.degraded, "degraded")


def admit(
    step: int,
    versions: Mapping[str, int | None],
    bound: StalenessBound,
    at_bound: AtBound,
    orphaned: Collection[str] = (),
    *,
    newest_statistics: int | None = None,
) -> Admission:
    """Decide whether `step` may be preconditioned, layer by layer.

    `versions` has the newest accepted inverse of each layer, None before the first. `orphaned` are
    the layers that nobody refreshes now: their inverse worker is being replaced, or their
    inversion failed and the worker says so. They are never waited for. `newest_statistics` is the
    newest step whose statistics were accepted (0: none so far), where that is known: no inverse
    can be newer, so one that is as new is not waited for either.

    With `at_bound` "damp" a layer beyond the bound is damped and not waited for, but not in a
    step that uses exact versions and not before its first inverse. A recorded step has the layers
    beyond the bound that it had.
    """
    may_damp = at_bound == "damp" and not bound.is_exact(step)
    decided: dict[str, list[str]] = {"wait_for": [], "damp": [], "degraded": [], "gradient": []}
    recorded = bound.recorded.beyond_bound.get(step, {}) if bound.recorded else {}
    for name, version in versions.items():
        if (version or 0) >= bound.oldest_admissible(step, name):
            if name in recorded:
                decided[recorded[name]].append(name)
            continue
        exhausted = newest_statistics is not None and newest_statistics <= (version or 0)
        if name in orphaned or exhausted:
            outcome = "gradient" if version is None else "degraded"
        else:
            outcome = "damp" if may_damp and version is not None else "wait_for"
        decided[outcome].append(name)
    return Admission(**{outcome: tuple(names) for outcome, names in decided.items()})
