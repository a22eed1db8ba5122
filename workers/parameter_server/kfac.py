"""A shard's part of K-FAC; read `KFACShard.step` first, beside `KFAC.step`.

No Ray here: the actor in `workers.member.actor` is a shell around this. A shard owns whole blocks:
their parameters and previous update, and the inverses it has received for them. The first shard
also decides for all (`workers.parameter_server.decider`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.core.inverse.directions import DirectionComputer
from kfac_dist.core.inverse.shelf import InverseVersion
from kfac_dist.core.step.block_numbers import block_numbers
from kfac_dist.core.step.choice import combine
from kfac_dist.core.vector import is_finite
from kfac_dist.optim.arithmetic import in_full_precision
from workers.exchange.arrays import Array, Arrays, section, to_array, to_tensor
from workers.exchange.checksum import checksum
from workers.exchange.messages import ShardReport, StepOrder
from workers.exchange.moments import ShardMoments
from workers.exchange.process_group import Group, Kind
from workers.exchange.shard_plan import ShardPlan
from workers.exchange.step import Coefficients, DecidingSide, ShardSide, StepVerdict
from workers.heartbeat import beat_step
from workers.parameter_server.decider import BatchLosses, KFACDecider, l2_term
from workers.parameter_server.inverse_store import AdmittedInverses, InverseStore
from workers.parameter_server.state import ShardState
from workers.phases import Phases

_ROUNDED = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class _TriedDirections:
    """What a step tries: the admitted inverses, and by candidate the directions [C, Q].

    `numbers` [B, 2 + 3C] are the inner products of this shard's blocks.
    """

    inverses: AdmittedInverses
    directions: Tensor
    numbers: Tensor


@dataclass(frozen=True, kw_only=True)
class _ShardStart:
    """What a step began with, beside parameters and previous update."""

    in_use: Mapping[str, InverseVersion]
    stale_applied: int


class KFACShard:
    """Preconditions its slice of the gradient and applies the update to its parameters.

    `step_done` is the last step that it has applied or skipped.
    """

    def __init__(
        self,
        settings: KFACSpec,
        plan_shards: Callable[[int], ShardPlan],
        state: ShardState,
        store: InverseStore,
        least_cases: int,
        decider: KFACDecider | None,
    ) -> None:
        """Store the parts.

        Args:
            settings: the options of K-FAC.
            plan_shards: returns how the parameters are cut into a number of shards.
            state: the shard's parameters.
            store: the inverses of its blocks.
            least_cases: the number of cases that a pass over the model needs.
            decider: that of the first shard, None in the others.
        """
        self.state = state
        self._settings = settings
        self._plan_shards = plan_shards
        self._store = store
        self._least_cases = least_cases
        self._decider = decider
        self._previous_update = torch.zeros_like(state.parameters)
        self._spare = torch.zeros_like(state.parameters)  # the update before the previous one
        self.step_done = 0
        self._applied_step = 0
        self._starts: dict[int, _ShardStart] = {}
        self._tried_directions = state.parameters.new_zeros((1, state.layout.size))
        self._counts: Counter[str] = Counter()
        self._stale_applied = 0
        self._group: Group  # set by `join`
        self._subset: SubsetRule  # set by `join`
        self._side: ShardSide  # set by `join`
        self._deciding: DecidingSide  # set by `join`, used by the first shard
        self._moments: ShardMoments  # set by `join`
        self._directions: DirectionComputer  # set by `join`

    def join(self, group: Group, step: int) -> None:
        """Exchange through `group` after `step`, and send the workers this shard's state."""
        self.step_done = step
        parameters = self.state.parameters
        self._group = group
        self._subset = SubsetRule(least_cases=self._least_cases, num_workers=len(group.workers))
        plan = self._plan_shards(len(group.shards))
        self._side = ShardSide(group, plan, parameters)
        self._deciding = DecidingSide(group, plan, parameters)
        if self._decider is not None:
            self._decider.join(self._deciding, self._subset)
        self._agree_on_type()
        self._side.send_state(parameters, self._previous_update)
        if (average := self.state.average) is not None:
            self._side.send_average(average.num_averaged, average.value)
        layers = self._store.layers if self._store.structure.observes_moments else ()
        self._moments = ShardMoments(group, layers, parameters)
        self._moments.send_bases(self._store.bases())
        group.take_traffic()  # traffic is counted per step, and joining is not part of one

    def _agree_on_type(self) -> None:
        """Precondition in the type of the first shard, which each shard may have measured."""
        is_first = self._decider is not None
        own = self._settings.precondition_dtype == _ROUNDED
        rounded = self._deciding.share(own) if is_first else self._side.receive_shared()
        dtype = _ROUNDED if rounded else "float32"
        settings = self._settings.model_copy(update={"precondition_dtype": dtype})
        self._directions = DirectionComputer(settings, self._store.structure)

    @in_full_precision
    def step(self, order: StepOrder) -> ShardReport:
        """Do the shard's part of one step.

        Raises:
            PeerLostError: another member is gone.
            TimedOutError: an inverse that the step must wait for does not come.
        """
        plan, phases = order.plan, Phases()
        beat_step(plan.step)
        self._begin(plan.step)
        if self._decider is not None:
            self._decider.begin_step(plan)
        gradient = self._receive_gradient(order, phases)
        verdict = self._verdict(plan, gradient, phases)
        # The workers compute their statistics now. The shard preconditions meanwhile, if it can.
        ahead = verdict.goes_on and not self._needs_statistics(plan)
        tried = self._precondition(plan, gradient, verdict, phases) if ahead else None
        self._receive_statistics(order, phases, is_finite=verdict.goes_on)
        if not verdict.goes_on:
            if self._decider is not None:
                self._decider.skip_step(plan)
            return self._report(plan, None, phases)
        if tried is None:
            tried = self._precondition(plan, gradient, verdict, phases)
        with phases("send_directions"):
            self._side.send_directions(tried.directions)
        choice = self._choice(order, tried, phases)
        if choice is not None:
            self._apply(plan, tried, choice, phases)
            if plan.measure:
                self._measure(phases)
        return self._report(plan, tried.inverses, phases)

    def _begin(self, step: int) -> None:
        """Remember what is needed to repeat the step, or the one before it."""
        self._starts = {s: start for s, start in self._starts.items() if s == step - 1}
        self._starts[step] = _ShardStart(
            in_use=self._store.in_use(), stale_applied=self._stale_applied
        )

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it.

        Parameters are then those of before to rounding: the update is subtracted again.
        """
        if self.step_done > step and self._applied_step == self.step_done:
            self.state.undo(self._applied_step, self._previous_update)
            self._previous_update, self._spare = self._spare, self._previous_update
            self._applied_step = 0
        self.step_done = min(self.step_done, step)
        if (start := self._starts.get(step + 1)) is not None:
            self._store.put_in_use(start.in_use)
            self._stale_applied = start.stale_applied
        if self._decider is not None:
            self._decider.rewind(step)

    def _receive_gradient(self, order: StepOrder, phases: Phases) -> Tensor:
        with phases("reduce"):
            total = self._side.receive_gradient()
            return self.state.mean_gradient(total, order.window.size)

    def _verdict(self, plan: StepPlan, gradient: Tensor, phases: Phases) -> StepVerdict:
        finite = is_finite(gradient)
        with phases("reduce"):
            if self._decider is None:
                self._side.report(Kind.FINITE, torch.tensor([float(finite)]).double())
                self._report_squares()
                return self._side.receive_verdict()
            loss_sum, num_cases = self._deciding.receive_sums()
            before = l2_term(self._deciding, self.state.l2, self._squares())
            losses = BatchLosses(loss_sum, num_cases, before)
            return self._decider.verdict(plan, losses, is_finite=finite)

    def _squares(self) -> Tensor:
        return self.state.squares() if self.state.l2 else torch.zeros(0)

    def _report_squares(self) -> None:
        if self.state.l2:
            self._side.report(Kind.SQUARES, self.state.squares())

    def _needs_statistics(self, plan: StepPlan) -> bool:
        """Return whether the direction of a step depends on the statistics of the same step.

        It does where moments are averaged into the inverses in use, and where the step has to wait
        for an inverse, which may contain these statistics.
        """
        return plan.update_factors and (
            self._store.structure.observes_moments or not self._store.is_ready(plan.step)
        )

    def _receive_statistics(self, order: StepOrder, phases: Phases, *, is_finite: bool) -> None:
        """Average the moments of a step into the inverses, unless its statistics were refused."""
        if not order.plan.update_factors:
            return
        with phases("wait_statistics"):
            usable = self._side.receive_usable()
            moments = self._moments.receive()
        if self._decider is not None:
            self._decider.note_statistics(usable=usable, is_finite=is_finite)
        if usable:
            self._store.note_statistics(order.plan.step)
            rows = self._subset.positions(order.window.size, self._settings.statistics_fraction)
            self._store.observe(moments, len(rows))

    def _precondition(
        self, plan: StepPlan, gradient: Tensor, verdict: StepVerdict, phases: Phases
    ) -> _TriedDirections:
        inverses = self._wait_for_inverses(plan, verdict, phases)
        with phases("precondition"):
            layout = self.state.layout
            solved, fallen = self._directions.compute(
                layout.matrices(gradient), inverses.candidates(), inverses.gammas
            )
            self._counts["gradient_fallback"] += len(fallen)
            directions = self._direction_memory(len(solved))
            for by_block, direction in zip(solved, directions, strict=True):
                layout.write(by_block, direction)
            numbers = block_numbers(
                layout.regions(gradient),
                [layout.regions(direction) for direction in directions],
                layout.regions(self._previous_update),
            )
        return _TriedDirections(inverses=inverses, directions=directions, numbers=numbers)

    def _direction_memory(self, count: int) -> Tensor:
        """Return memory for directions [count, Q], which the next step overwrites."""
        # New memory costs more, page by page, than writing to it.
        if len(self._tried_directions) < count:
            self._tried_directions = self.state.parameters.new_zeros(
                (count, self.state.layout.size)
            )
        return self._tried_directions[:count]

    def _wait_for_inverses(
        self, plan: StepPlan, verdict: StepVerdict, phases: Phases
    ) -> AdmittedInverses:
        """Return the inverses of a step: at one gamma, or at several when a search is decided.

        A search is decided in the first step in which every layer has an inverse for all gammas.
        """
        with phases("wait_inverse"):
            inverses = self._store.admit(plan.step)
        with phases("install"):
            inverses = self._store.install(inverses)
        gammas: tuple[float, ...] = (verdict.gamma,)
        if verdict.search:
            with phases("wait_inverse"):
                gammas = self._searched_gammas(verdict, inverses.carry(verdict.search))
        return self._store.at_gammas(inverses, gammas)

    def _searched_gammas(self, verdict: StepVerdict, is_complete: bool) -> tuple[float, ...]:
        if self._decider is not None:
            return self._decider.gammas(verdict, is_complete=is_complete)
        self._side.report(Kind.COMPLETE, torch.tensor([float(is_complete)]).double())
        return self._side.receive_gammas(verdict.search, verdict.gamma)

    def _choice(
        self, order: StepOrder, tried: _TriedDirections, phases: Phases
    ) -> Coefficients | None:
        if self._decider is not None:
            return self._decider.choose(order, tried.numbers, tried.inverses.gammas, phases)
        self._side.report(Kind.NUMBERS, tried.numbers)
        with phases("fisher_products"):
            return self._side.receive_choice()

    def _apply(
        self, plan: StepPlan, tried: _TriedDirections, choice: Coefficients, phases: Phases
    ) -> None:
        with phases("apply"):
            direction = tried.directions[choice.candidate]
            # The update before this one is kept, so that the step can be undone.
            update = combine(
                direction, self._previous_update, choice.alpha, choice.mu, out=self._spare
            )
            self._previous_update, self._spare = update, self._previous_update
            self.state.parameters.add_(update)
            self.state.applied(plan.step)
            self._applied_step = self.step_done = plan.step
        self._store.use(tried.inverses, choice.gamma, search_open=choice.search_open)
        self._stale_applied += len(tried.inverses.admission.stale)
        with phases("send_bases"):
            self._moments.send_bases(self._store.bases())

    def _measure(self, phases: Phases) -> None:
        with phases("measure"):
            if self._decider is None:
                self._report_squares()
            else:
                self._decider.adapt_damping(self._squares())

    def _report(
        self, plan: StepPlan, inverses: AdmittedInverses | None, phases: Phases
    ) -> ShardReport:
        held = inverses.held if inverses else {}
        self.step_done = plan.step
        decision = None
        if self._decider is not None:
            decision = self._decider.decision(plan, self.state.version)
        return ShardReport(
            step=plan.step,
            decision=decision,
            inverse_version_step={name: version.version_step for name, version in held.items()},
            inverse_gammas={name: tuple(version.by_gamma) for name, version in held.items()},
            stale_layers=inverses.admission.beyond_bound if inverses else {},
            accepted=self._store.take_accepted(),
            stale_applied_total=self._stale_applied,
            numeric_events=dict(self._events()),
            waited_seconds=inverses.waited_seconds if inverses else 0.0,
            phase_seconds=phases.seconds,
            traffic=self._group.take_traffic(),
            step_seconds=phases.elapsed(),
            time=time.time(),
        )

    def _events(self) -> Counter[str]:
        decided = self._decider.counts if self._decider is not None else Counter[str]()
        return self._counts + decided + self._store.counts()

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`; only the first shard knows them."""
        assert self._decider is not None, "the first shard decides"
        return self._decider.next_gammas(step)

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""
        # Checkpoints contain these names, so they must not change.
        own: dict[str, Array] = {
            f"count:{kind}": to_array(torch.tensor(number))
            for kind, number in self._events().items()
        }
        own["stale_applied"] = to_array(torch.tensor(self._stale_applied))
        own["update:previous_update"] = to_array(self._previous_update.clone())
        if self._decider is not None:
            own |= self._decider.snapshot()
        own |= {f"inverse:{name}": array for name, array in self._store.snapshot().items()}
        return self.state.snapshot() | own

    def restore(self, snapshot: Arrays) -> None:
        """Restore a shard's part of a snapshot of the same model."""
        self.state.restore(snapshot)
        self._previous_update.copy_(to_tensor(snapshot["update:previous_update"]))
        self._counts = _counts(snapshot)
        self._stale_applied = int(snapshot.get("stale_applied", 0))
        if self._decider is not None:
            self._decider.restore(snapshot)
        self._store.restore(section(snapshot, "inverse:"))

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return checksum(self.state.parameters, self._previous_update)


def _counts(snapshot: Mapping[str, Array]) -> Counter[str]:
    return Counter({kind: int(n) for kind, n in section(snapshot, "count:").items()})
