"""The decisions of a step, which the first shard makes for all; read `KFACDecider` from the top.

It owns damping, gamma and the search for gamma. It needs only numbers: the losses of the workers,
and the inner products of whole vectors, which each shard forms for its blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.steps.plan import StepPlan, StepSchedule
from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.core.passes.fisher import FisherMeans
from kfac_dist.core.step.block_numbers import direction_numbers, total_square
from kfac_dist.core.step.choice import Choice
from kfac_dist.core.step.update import KFACUpdate
from workers.exchange.arrays import Array, Arrays, section, to_arrays, to_tensors
from workers.exchange.decisions import DecisionMirror
from workers.exchange.messages import StepDecision, StepOrder
from workers.exchange.process_group import Kind
from workers.exchange.step import Coefficients, DecidingSide, StepVerdict
from workers.parameter_server.refresh_requests import RefreshRequests
from workers.phases import Phases


class BatchLosses:
    """The mean loss and the objective of a batch, in nats a case, as the deciding shard sums them.

    `l2_term` is that of the parameters before the step.
    """

    def __init__(self, loss_sum: float, num_cases: int, l2_term: float) -> None:
        self.loss = loss_sum / num_cases
        self.objective = self.loss + l2_term
        self.num_cases = num_cases


def l2_term(side: DecidingSide, l2: float, own_squares: Tensor) -> float:
    """Return (l2 / 2) ||theta||^2 from the squares of all shards; `own_squares` [B] are the own."""
    if l2 == 0:
        return 0.0  # the other shards report nothing then
    return 0.5 * l2 * total_square(side.collect_blocks(Kind.SQUARES, own_squares))


class KFACDecider:
    """Decides whether a step continues, its gammas, its choice, and how the damping moves."""

    def __init__(
        self,
        settings: KFACSpec,
        schedule: StepSchedule,
        requests: RefreshRequests,
    ) -> None:
        self._settings = settings
        self._schedule = schedule
        self._requests = requests
        self._update = KFACUpdate(settings)
        self._side: DecidingSide  # set by `join`
        self._subset: SubsetRule  # set by `join`
        self._losses: BatchLosses  # of the step in hand
        self._choice: Choice | None = None
        self._ratio: float | None = None
        self._accepted: bool | None = None
        self._before: dict[int, DecisionMirror] = {}  # by step: the state in which it began
        self._decided: tuple[int, StepDecision] | None = None  # the last step that has ended
        self._refused_in_a_row = 0
        self.counts: Counter[str] = Counter()

    def join(self, side: DecidingSide, subset: SubsetRule) -> None:
        """Exchange through `side` from now on; `subset` chooses the Fisher cases."""
        self._side, self._subset = side, subset

    def begin_step(self, plan: StepPlan) -> None:
        """Ask for the inverses that are due, and set what a schedule gives for the step."""
        self._before = {step: m for step, m in self._before.items() if step == plan.step - 1}
        self._before[plan.step] = self._mirror(plan.step - 1)
        self._requests.send(plan, self.next_gammas(plan.step))
        self._update.begin_step(plan.damping)
        self._choice = self._ratio = self._accepted = None

    def _mirror(self, last_step: int) -> DecisionMirror:
        update, decided = self._update.state_dict(), self._decided
        return DecisionMirror(
            step=last_step,
            decision=decided[1] if decided is not None and decided[0] == last_step else None,
            damping=float(update["damping"]),
            gamma=float(update["gamma"]),
            fisher_noise=float(update["fisher_noise"]),
            search=tuple(update["search"].tolist()),
        )

    def rewind(self, step: int) -> None:
        """Go back to the end of `step`, which is the last one or the one before it."""
        if (mirror := self._before.get(step + 1)) is not None:
            self._update.load_state_dict(
                {
                    "damping": torch.tensor(mirror.damping, dtype=torch.float64),
                    "gamma": torch.tensor(mirror.gamma, dtype=torch.float64),
                    "fisher_noise": torch.tensor(mirror.fisher_noise, dtype=torch.float64),
                    "search": torch.tensor(mirror.search, dtype=torch.float64),
                }
            )
            self._decided = None if mirror.decision is None else (step, mirror.decision)
            self._refused_in_a_row = mirror.decision.refused_in_a_row if mirror.decision else 0

    def next_gammas(self, step: int) -> tuple[float, ...]:
        """Return the gammas to invert with for `step`, including those of an open search."""
        plan = self._schedule.plan(step)
        return self._update.requested_gammas(search=plan.search_gamma, damping=plan.damping)

    def verdict(self, plan: StepPlan, losses: BatchLosses, *, is_finite: bool) -> StepVerdict:
        """Decide whether the step continues, and tell the other shards.

        `is_finite` is what this shard found of its slice of the gradient.
        """
        self._losses = losses
        found = self._side.collect(Kind.FINITE, torch.tensor([float(is_finite)]).double())
        goes_on = math.isfinite(losses.loss) and all(bool(flag) for flag in found)
        verdict = StepVerdict(
            goes_on=goes_on,
            gamma=self._update.gamma,
            search=self._update.wanted_gammas(search=plan.search_gamma) if goes_on else (),
        )
        self._side.send_verdict(verdict)
        return verdict

    def gammas(self, verdict: StepVerdict, *, is_complete: bool) -> tuple[float, ...]:
        """Decide whether the open search is decided now, and return the gammas to try.

        It is when every shard has inverses for all gammas; `is_complete` says it of this one.
        """
        found = self._side.collect(Kind.COMPLETE, torch.tensor([float(is_complete)]).double())
        decided = all(bool(flag) for flag in found)
        self._side.send_gammas(decided=decided)
        if not decided:
            return (verdict.gamma,)
        self._update.decide_search()
        return verdict.search

    def note_statistics(self, *, usable: bool, is_finite: bool) -> None:
        """Count statistics that were refused; if a gradient is not finite, the step is bad."""
        self._accepted = usable
        if usable:
            self._refused_in_a_row = 0
        else:
            self._refused_in_a_row += is_finite

    def choose(
        self, order: StepOrder, numbers: Tensor, gammas: Sequence[float], phases: Phases
    ) -> Coefficients | None:
        """Choose candidate, step size and momentum, and tell all members.

        `numbers` [B, 2 + 3C] are those of this shard's blocks. None if nothing may be applied.
        """
        plan, size = order.plan, order.window.size
        fraction = self._update.fisher_fraction(size, measure=plan.measure)
        self._side.send_header(len(gammas), fraction, self._before[plan.step])
        with phases("fisher_products"):
            all_numbers = self._side.collect_blocks(Kind.NUMBERS, numbers)
            fisher = self._fisher_means(len(gammas), size, fraction)
        choice = self._update.choose(direction_numbers(all_numbers), gammas, fisher, lr=plan.lr)
        search_open = self._update.search_open
        self._side.send_choice(choice, search_open=search_open, measure=plan.measure)
        if not choice.applied:
            self.counts["bad_step"] += 1
            return None
        self._choice = choice
        return Coefficients(
            candidate=choice.candidate,
            alpha=choice.alpha,
            mu=choice.mu,
            gamma=choice.gamma,
            search_open=search_open,
            measure=plan.measure,
        )

    def _fisher_means(
        self, num_directions: int, size: int, fraction: float | None
    ) -> FisherMeans | None:
        if fraction is None:
            return None
        sums = self._side.receive_fisher(num_directions + 1)
        return sums.mean(len(self._subset.positions(size, fraction)))

    def skip_step(self, plan: StepPlan) -> None:
        """Tell the workers that the step is skipped."""
        self.counts["bad_step"] += 1
        self._side.send_header(0, None, self._before[plan.step])

    def adapt_damping(self, own_squares: Tensor) -> None:
        """Move the damping by the loss at the new parameters, which the workers send."""
        assert self._choice is not None, "a step that measures was applied"
        loss = self._side.receive_loss() / self._losses.num_cases
        after = loss + l2_term(self._side, self._settings.l2, own_squares)
        self._ratio = self._update.adapt_damping(self._choice, after - self._losses.objective)

    def decision(self, plan: StepPlan, parameter_version: int) -> StepDecision:
        """Return what was decided in the step that ends now."""
        choice, losses = self._choice, self._losses
        decision = StepDecision(
            applied=choice is not None,
            parameter_version=parameter_version,
            loss=losses.loss,
            objective=losses.objective,
            num_cases=losses.num_cases,
            alpha=choice.alpha if choice else None,
            mu=choice.mu if choice else None,
            update_norm=choice.update_norm if choice else 0.0,
            predicted_change=choice.predicted_change if choice else None,
            reduction_ratio=self._ratio,
            damping=self._update.damping,
            gamma=self._update.gamma,
            lr=plan.lr,
            next_gammas=self.next_gammas(plan.step + 1),
            fisher_noise=self._update.fisher_noise,
            open_search=self._update.wanted_gammas(search=False),
            accepted_statistics=self._accepted,
            refused_in_a_row=self._refused_in_a_row,
        )
        self._decided = (plan.step, decision)
        return decision

    def snapshot(self) -> dict[str, Array]:
        """Return everything the next step depends on, by flat names."""
        state = {f"update:{k}": v for k, v in self._update.state_dict().items()}
        return to_arrays(state)

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot."""
        state = to_tensors(section(snapshot, "update:"))
        if "damping" in state:  # else it is the state before the first step
            self._update.load_state_dict(state)
