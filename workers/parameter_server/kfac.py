"""The parameter server's part of K-FAC; read `KFACServer.step` first, beside `KFAC.step`.

No Ray here: the actor in `workers.parameter_server.actor` is a shell around this. The server owns
the parameters, the previous update, damping and gamma, and the inverses it has received.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.passes.fisher import FisherMeans
from kfac_dist.core.step.choice import Choice
from kfac_dist.core.step.update import KFACUpdate
from kfac_dist.optim.arithmetic import in_full_precision
from workers.exchange.arrays import Array, Arrays, section, to_arrays, to_tensors
from workers.exchange.checksum import checksum
from workers.exchange.messages import ServerReport, StepOrder
from workers.exchange.moments import ServerMoments
from workers.exchange.process_group import Group
from workers.exchange.step import Directions, ServerSide
from workers.parameter_server.inverse_store import AdmittedInverses, InverseStore
from workers.parameter_server.state import MeanGradient, ServerState
from workers.phases import Phases


class KFACServer:
    """Decides direction, step size, damping and gamma, and applies the update."""

    def __init__(
        self,
        spec: JobSpec,
        schedule: StepSchedule,
        registration: Registration,
        state: ServerState,
        store: InverseStore,
    ) -> None:
        assert isinstance(spec.optimizer, KFACSpec)
        self.state = state
        self._settings = spec.optimizer
        self._schedule = schedule
        self._store = store
        self._subset = SubsetRule(
            least_cases=registration.least_cases, num_workers=spec.workers.gradient
        )
        self._layers = registration.names  # in the order of the model, as reports show them
        self._update = KFACUpdate(spec.optimizer, registration, torch.zeros_like(state.parameters))
        self._counts: Counter[str] = Counter()
        self._stale_applied = 0
        self._refused_in_a_row = 0
        observes = store.structure.observes_moments
        self._moment_layers = registration.names if observes else ()
        self._side: ServerSide  # set by `join`
        self._moments: ServerMoments  # set by `join`

    def join(self, group: Group) -> None:
        """Exchange through `group` from now on, and send the workers the server's state."""
        parameters = self.state.parameters
        self._side = ServerSide(group, parameters.numel(), parameters)
        self._side.send_state(parameters, self._update.previous_update)
        self._moments = ServerMoments(group, self._moment_layers, parameters)
        self._moments.send_bases(self._store.bases())

    @in_full_precision
    def step(self, order: StepOrder) -> ServerReport:
        """Do the server's part of one step.

        Raises:
            PeerLostError: a gradient worker is gone.
            TimedOutError: an inverse that the step must wait for does not come.
        """
        plan, phases = order.plan, Phases()
        self._update.begin_step(plan.damping)
        mean = self._receive_gradient(phases)
        finite = mean.is_finite()
        # The workers compute their statistics now. The server preconditions meanwhile, if it can.
        ahead = finite and not self._needs_statistics(plan)
        if ahead:
            inverses, directions = self._precondition(plan, mean, phases)
        self._receive_statistics(order, phases, finite=finite)
        if not finite:
            self._side.skip_step()
            return self._skipped(order, mean, phases)
        if not ahead:
            inverses, directions = self._precondition(plan, mean, phases)
        fisher = self._receive_fisher_products(order, directions, phases)
        gammas = inverses.gammas
        choice = self._update.choose(mean.gradient, directions, gammas, fisher, lr=plan.lr)
        self._side.send_choice(choice, measure=plan.measure)
        if not choice.applied:
            return self._skipped(order, mean, phases, inverses)
        self._apply(plan, inverses, choice, directions, phases)
        self._send_bases(phases)
        ratio = self._adapt_damping(order, choice, mean, phases)
        return self._report(order, mean, inverses, choice, ratio, phases)

    def _receive_gradient(self, phases: Phases) -> MeanGradient:
        with phases("reduce"):
            return self.state.mean(self._side.receive_gradient())

    def _needs_statistics(self, plan: StepPlan) -> bool:
        """Return whether the direction of a step depends on the statistics of the same step.

        It does where moments are averaged into the inverses in use, and where the step has to wait
        for an inverse, which may contain these statistics.
        """
        return plan.update_factors and (
            self._store.structure.observes_moments or not self._store.is_ready(plan.step)
        )

    def _receive_statistics(self, order: StepOrder, phases: Phases, *, finite: bool) -> None:
        """Average the moments of a step into the inverses, unless its statistics were refused."""
        if not order.plan.update_factors:
            return
        with phases("wait_statistics"):
            usable = self._side.receive_usable()
            moments = self._moments.receive()
        if not usable:
            self._refused_in_a_row += finite  # a gradient that is not finite is a bad step instead
        else:
            self._refused_in_a_row = 0
            self._store.note_statistics(order.plan.step)
            rows = self._subset.positions(order.window.size, self._settings.statistics_fraction)
            self._store.observe(moments, len(rows))

    def _precondition(
        self, plan: StepPlan, mean: MeanGradient, phases: Phases
    ) -> tuple[AdmittedInverses, Tensor]:
        inverses = self._wait_for_inverses(plan, phases)
        with phases("precondition"):
            directions, fallen = self._update.directions(
                mean.gradient, inverses.candidates(), inverses.gammas
            )
        self._counts["gradient_fallback"] += len(fallen)
        return inverses, directions

    def _wait_for_inverses(self, plan: StepPlan, phases: Phases) -> AdmittedInverses:
        """Return the inverses of a step: at one gamma, or at several when a search is decided.

        A search is decided in the first step in which every layer has an inverse for all gammas.
        """
        with phases("wait_inverse"):
            inverses = self._store.admit(plan.step)
        with phases("install"):
            inverses = self._store.install(inverses)
        gammas = self._update.tried_gammas(inverses.carry, search=plan.search_gamma)
        return self._store.at_gammas(inverses, gammas)

    def _receive_fisher_products(
        self, order: StepOrder, directions: Tensor, phases: Phases
    ) -> FisherMeans | None:
        size = order.window.size
        fraction = self._update.fisher_fraction(size, measure=order.plan.measure)
        with phases("send_directions"):
            self._side.send_directions(Directions(vectors=directions, fisher_fraction=fraction))
        if fraction is None:
            return None
        with phases("fisher_products"):
            sums = self._side.receive_fisher(len(directions) + 1)
            return sums.mean(len(self._subset.positions(size, fraction)))

    def _apply(
        self,
        plan: StepPlan,
        inverses: AdmittedInverses,
        choice: Choice,
        directions: Tensor,
        phases: Phases,
    ) -> None:
        with phases("apply"):
            self.state.parameters.add_(self._update.advance(choice, directions))
            self.state.applied(plan.step)
        self._store.use(inverses, choice.gamma, search_open=self._update.search_open)
        self._stale_applied += len(inverses.admission.stale)

    def _send_bases(self, phases: Phases) -> None:
        with phases("send_bases"):
            self._moments.send_bases(self._store.bases())

    def _adapt_damping(
        self,
        order: StepOrder,
        choice: Choice,
        mean: MeanGradient,
        phases: Phases,
    ) -> float | None:
        if not order.plan.measure:
            return None
        with phases("measure"):
            after = self._side.receive_loss() / order.window.size + self.state.l2_term()
            return self._update.adapt_damping(choice, after - mean.objective)

    def _skipped(
        self,
        order: StepOrder,
        mean: MeanGradient,
        phases: Phases,
        inverses: AdmittedInverses | None = None,
    ) -> ServerReport:
        self._counts["bad_step"] += 1
        return self._report(order, mean, inverses, None, None, phases)

    def _report(
        self,
        order: StepOrder,
        mean: MeanGradient,
        inverses: AdmittedInverses | None,
        choice: Choice | None,
        ratio: float | None,
        phases: Phases,
    ) -> ServerReport:
        held = inverses.held if inverses else {}
        names = [name for name in self._layers if name in held]
        return ServerReport(
            step=order.plan.step,
            applied=choice is not None,
            loss=mean.loss,
            objective=mean.objective,
            num_cases=order.window.size,
            parameter_version=self.state.version,
            alpha=choice.alpha if choice else None,
            mu=choice.mu if choice else None,
            update_norm=choice.update_norm if choice else 0.0,
            predicted_change=choice.predicted_change if choice else None,
            reduction_ratio=ratio,
            damping=self._update.damping,
            gamma=self._update.gamma,
            lr=order.plan.lr,
            next_gammas=self.next_gammas(order.plan.step + 1),
            inverse_version_step={name: held[name].version_step for name in names},
            inverse_gammas={name: tuple(held[name].by_gamma) for name in names},
            stale_layers=inverses.admission.beyond_bound if inverses else {},
            accepted=self._store.take_accepted(),
            stale_applied_total=self._stale_applied,
            numeric_events=dict(self._counts + self._store.counts()),
            waited_seconds=inverses.waited_seconds if inverses else 0.0,
            phase_seconds=phases.seconds,
            refused_in_a_row=self._refused_in_a_row,
        )

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`, including those of an open search."""
        plan = self._schedule.plan(step)
        return self._update.requested_gammas(search=plan.search_gamma, damping=plan.damping)

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""
        # Checkpoints contain these names, so they must not change.
        update = {f"update:{k}": v for k, v in self._update.state_dict().items()}
        events = self._counts + self._store.counts()
        counts = {f"count:{k}": torch.tensor(v) for k, v in events.items()}
        counts["stale_applied"] = torch.tensor(self._stale_applied)
        inverses = {f"inverse:{k}": v for k, v in self._store.snapshot().items()}
        return self.state.snapshot() | to_arrays(update | counts) | inverses

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot of the same model."""
        self.state.restore(snapshot)
        update = to_tensors(section(snapshot, "update:"), self.state.parameters.device)
        self._update.load_state_dict(update)
        self._counts = Counter({k: int(v) for k, v in section(snapshot, "count:").items()})
        self._stale_applied = int(snapshot["stale_applied"])
        self._store.restore(section(snapshot, "inverse:"))

    def checksum(self) -> str:
        """Return the checksum of what the gradient workers mirror."""
        return checksum(self.state.parameters, self._update.previous_update)
