"""The first shard decides for all shards and workers, over real gloo connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.config import kfac_settings
from kfac_dist.coordination.steps.sampling import BatchWindow, SubsetRule
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.step.block_numbers import direction_numbers
from kfac_dist.core.step.update import KFACUpdate
from kfac_dist.optim.schedules import kfac_schedule
from tests.workers.whole_jobs.local_job import make_group
from workers.exchange.messages import RefreshRequest, StepOrder
from workers.exchange.process_group import Kind
from workers.exchange.shard_plan import plan_shards
from workers.exchange.step import DecidingSide, ShardSide, StepVerdict, WorkerSide
from workers.parameter_server.decider import BatchLosses, KFACDecider, l2_term
from workers.parameter_server.refresh_requests import RefreshRequests
from workers.phases import Phases

LIKE = torch.zeros(1, dtype=torch.float64)
SETTINGS = kfac_settings(
    {"damping": {"initial": 1.0}, "gamma": {"adapt_period": 3}, "fisher_fraction": 1.0, "l2": 0.25}
)
LOSSES = BatchLosses(6.0, 4, 0.5)
FISHER = FisherSums.unpacked(torch.tensor([[4.0, 1.0], [1.0, 2.0], [16.0, 4.0]]).double())


class Members:
    """One gradient worker, the deciding shard and others; `other` and `work` run beside a test."""

    def __init__(self, num_shards: int) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3))
        registration = register(net, SETTINGS)
        self.plan = plan_shards(registration, (), registration.num_parameters, num_shards)
        self.requests: list[RefreshRequest] = []
        worker, *shards = make_group(1, num_shards)
        self.worker = WorkerSide(worker, self.plan, LIKE)
        self.others = [ShardSide(group, self.plan, LIKE) for group in shards[1:]]
        schedule = kfac_schedule(SETTINGS)
        bound = StalenessBound(max_steps=0, warmup_steps=0, schedule=schedule)
        self.schedule = schedule
        self.decider = KFACDecider(SETTINGS, schedule, RefreshRequests(bound, self.requests.append))
        self.side = DecidingSide(shards[0], self.plan, LIKE)
        self.decider.join(self.side, SubsetRule(least_cases=1, num_workers=1))
        self._pool = ThreadPoolExecutor(num_shards)

    def beside(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments)

    def order(self, step: int) -> StepOrder:
        return StepOrder(
            plan=self.schedule.plan(step), window=BatchWindow(epoch=0, start=0, stop=4)
        )

    def rows(self, shard: int, numbers: Tensor) -> Tensor:
        """A shard's rows of numbers [B, K] in the order of the model."""
        return numbers[list(self.plan.places[shard])]


@pytest.fixture(params=[1, 2, 3])
def members(request: pytest.FixtureRequest) -> Members:
    return Members(request.param)


def verdict(members: Members, finite: Sequence[bool], losses: BatchLosses, step: int = 1) -> list:
    def other(side: ShardSide) -> StepVerdict:
        side.report(Kind.FINITE, torch.tensor([float(finite[side.number])]).double())
        return side.receive_verdict()

    seen = [members.beside(other, side) for side in members.others]
    own = members.decider.verdict(members.schedule.plan(step), losses, is_finite=finite[0])
    return [own, *(future.result(20) for future in seen)]


def test_a_step_continues_if_loss_and_every_slice_of_the_gradient_are_finite(members):
    num_shards = len(members.plan)
    fine = [True] * num_shards
    assert {v.goes_on for v in verdict(members, fine, LOSSES)} == {True}
    bad_loss = BatchLosses(math.nan, 4, 0.5)
    assert {v.goes_on for v in verdict(members, fine, bad_loss)} == {False}
    for shard in range(num_shards):
        broken = [number != shard for number in range(num_shards)]
        found = verdict(members, broken, LOSSES, step=3)
        assert {v.goes_on for v in found} == {False}
        assert all(v.search == () for v in found), "a step that is skipped opens no search"


def test_all_shards_see_the_gammas_of_a_search_and_it_is_decided_when_all_are_complete(members):
    num_shards = len(members.plan)
    found = verdict(members, [True] * num_shards, LOSSES, step=3)
    assert found == [found[0]] * num_shards
    search = found[0].search
    assert len(search) == 3
    assert search[0] == found[0].gamma

    def gammas(complete: Sequence[bool]) -> list[tuple[float, ...]]:
        def other(side: ShardSide) -> tuple[float, ...]:
            side.report(Kind.COMPLETE, torch.tensor([float(complete[side.number])]).double())
            return side.receive_gammas(search, found[0].gamma)

        seen = [members.beside(other, side) for side in members.others]
        own = members.decider.gammas(found[0], is_complete=complete[0])
        return [own, *(future.result(20) for future in seen)]

    for missing in range(num_shards):
        complete = [number != missing for number in range(num_shards)]
        assert gammas(complete) == [(found[0].gamma,)] * num_shards
        assert members.decider.next_gammas(4) == search, "the search is still open"
    assert gammas([True] * num_shards) == [search] * num_shards
    assert members.decider.next_gammas(4) == (found[0].gamma,)


NUMBERS = torch.tensor(
    [[0.1, 0.3, 1.0, 0.5, 0.2], [0.2, 0.1, 3.0, 0.7, 0.4], [0.7, 0.9, 0.3, 0.1, 0.6]]
).double()


def choose(members: Members, order: StepOrder, numbers: Tensor) -> tuple[list, Any]:
    def other(side: ShardSide) -> Any:
        side.report(Kind.NUMBERS, members.rows(side.number, numbers))
        return side.receive_choice()

    def work() -> Any:
        # The shards' slices of the directions are not sent here, so only the header is read.
        count, fraction = members.worker._receive_header()
        members.worker.send_fisher(FISHER)
        return count, fraction, members.worker.receive_choice()

    seen = [members.beside(other, side) for side in members.others]
    worked = members.beside(work)
    rows = members.rows(0, numbers)
    own = members.decider.choose(order, rows, [1.0], Phases())
    count, fraction, chosen = worked.result(20)
    assert (count, fraction) == (1.0, 1.0)
    return [own, chosen, *(future.result(20) for future in seen)], own


def test_all_members_receive_the_choice_that_one_process_would_make(members):
    order = members.order(1)
    members.decider.begin_step(order.plan)
    assert [request.step for request in members.requests] == [1]
    verdict(members, [True] * len(members.plan), LOSSES)
    seen, own = choose(members, order, NUMBERS)
    assert seen == [own] * len(seen)
    alone = KFACUpdate(SETTINGS)
    expected = alone.choose(direction_numbers(NUMBERS), [1.0], FISHER.mean(4), lr=None)
    assert (own.alpha, own.mu, own.gamma) == (expected.alpha, expected.mu, expected.gamma)
    decision = members.decider.decision(order.plan, 1)
    assert decision.applied
    assert (decision.loss, decision.objective) == (1.5, 2.0)
    assert decision.update_norm == expected.update_norm
    assert decision.predicted_change == expected.predicted_change


def test_nothing_is_applied_and_the_step_is_counted_if_no_candidate_is_finite(members):
    order = members.order(1)
    members.decider.begin_step(order.plan)
    verdict(members, [True] * len(members.plan), LOSSES)
    seen, own = choose(members, order, NUMBERS.clone().fill_(math.nan))
    assert own is None
    assert seen == [None] * len(seen)
    assert members.decider.counts == {"bad_step": 1}
    assert not members.decider.decision(order.plan, 1).applied


def test_the_damping_moves_by_the_loss_at_the_new_parameters_and_the_squares_of_all_shards():
    dampings = []
    for num_shards in (1, 3):
        members = Members(num_shards)
        order = members.order(5)
        members.decider.begin_step(order.plan)
        verdict(members, [True] * num_shards, LOSSES)
        choose(members, order, NUMBERS)
        squares = torch.tensor([1.0, 0.5, 0.25]).double()
        members.worker.send_loss(torch.tensor(5.0).double())
        for side in members.others:
            side.report(Kind.SQUARES, members.rows(side.number, squares))
        members.decider.adapt_damping(members.rows(0, squares))
        decision = members.decider.decision(order.plan, 1)
        actual = 5.0 / 4 + 0.5 * 0.25 * 1.75 - LOSSES.objective
        assert decision.reduction_ratio is not None
        alone = KFACUpdate(SETTINGS)
        choice = alone.choose(direction_numbers(NUMBERS), [1.0], FISHER.mean(4), lr=None)
        assert decision.reduction_ratio == alone.adapt_damping(choice, actual)
        assert decision.damping == alone.damping != 1.0
        dampings.append(decision.damping)
    assert dampings[0] == dampings[1]


def test_without_an_l2_term_the_shards_report_no_squares(members):
    assert l2_term(members.side, 0.0, torch.zeros(0)) == 0.0


def test_statistics_that_are_refused_are_counted_in_a_row_while_gradients_are_finite():
    members = Members(1)
    decider, plan = members.decider, members.schedule.plan(1)
    decider.begin_step(plan)
    decider.verdict(plan, LOSSES, is_finite=True)
    counts = []
    for usable, finite in [
        (False, True),
        (False, True),
        (False, False),
        (False, True),
        (True, True),
    ]:
        decider.note_statistics(usable=usable, is_finite=finite)
        counts.append(decider.decision(plan, 0).refused_in_a_row)
    assert counts == [1, 2, 2, 3, 0]


def test_a_step_that_is_repeated_begins_as_it_began_before():
    members = Members(1)
    decider, counts = members.decider, []
    for step in (1, 2, 3, 3, 3):
        plan = members.schedule.plan(step)
        decider.rewind(step - 1)
        decider.begin_step(plan)
        damping = decider._update.damping
        decider.verdict(plan, LOSSES, is_finite=True)
        decider.note_statistics(usable=False, is_finite=True)
        counts.append((damping, decider.decision(plan, 0).refused_in_a_row))
    assert [refused for _, refused in counts] == [1, 2, 3, 3, 3]
    assert counts[2] == counts[3] == counts[4]


def test_a_snapshot_continues_an_open_search():
    members = Members(1)
    members.decider.begin_step(members.schedule.plan(3))
    (found,) = verdict(members, [True], LOSSES, step=3)
    again = Members(1)
    again.decider.restore(members.decider.snapshot())
    assert again.decider.next_gammas(4) == found.search
    (resumed,) = verdict(again, [True], LOSSES, step=4)
    assert resumed == found
