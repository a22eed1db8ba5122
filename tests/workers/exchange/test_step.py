"""The protocol of a step over real gloo connections, with one shard and with several."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import GradientSums
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.step.choice import Choice, skipped_choice
from tests.workers.whole_jobs.local_job import in_threads, make_group
from workers.exchange.decisions import DecisionMirror
from workers.exchange.process_group import Group, Kind
from workers.exchange.shard_plan import ShardPlan, plan_shards
from workers.exchange.step import Coefficients, DecidingSide, ShardSide, StepVerdict, WorkerSide

LIKE = torch.zeros(1, dtype=torch.float64)
CHOICE = Choice(
    candidate=1,
    gamma=0.1 + 0.2,
    alpha=1 / 3,
    mu=-1e-17,
    update_norm=1.0,
    predicted_change=None,
    prediction_for_ratio=None,
)
MIRROR = DecisionMirror(
    step=4, decision=None, damping=0.1, gamma=1 / 3, fisher_noise=0.0, search=(1 / 3, 0.7)
)
CHOSEN = Coefficients(
    candidate=1, alpha=1 / 3, mu=-1e-17, gamma=0.1 + 0.2, search_open=True, measure=True
)


def plan_of(num_shards: int) -> ShardPlan:
    """Four blocks, 43 parameters."""
    layers = [nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3), nn.Linear(3, 2)]
    registration = register(nn.Sequential(*layers), kfac_settings({}))
    return plan_shards(registration, (), registration.num_parameters, num_shards)


def gradient_of(rank: int, plan: ShardPlan) -> Tensor:
    return (torch.arange(plan.num_parameters).double() + 1) / (7 + rank)


@dataclass
class Served:
    """What a shard saw of the step."""

    gradient: Tensor
    usable: bool
    verdict: StepVerdict
    gammas: tuple[float, ...]
    choice: Coefficients | None
    collected: tuple


def work(group: Group, plan: ShardPlan) -> tuple:
    side, rank = WorkerSide(group, plan, LIKE), group.rank
    state = side.receive_state()
    loss = torch.tensor(1.0 + rank).double()
    side.send_gradient(GradientSums(loss, gradient_of(rank, plan)), 4 + rank)
    side.send_usable(rank == 0)
    directions = side.receive_directions()
    side.send_fisher(FisherSums.unpacked(torch.full((4, 3), 1.0 + rank).double()))
    choice = side.receive_choice()
    side.send_loss(loss)
    mirror = side.mirror
    return state, directions, mirror, choice, side.receive_directions(), side.receive_choice()


def serve(group: Group, plan: ShardPlan) -> Served:
    side, deciding = ShardSide(group, plan, LIKE), DecidingSide(group, plan, LIKE)
    first, layout = side.number == 0, plan.layouts[side.number]
    whole = torch.arange(plan.num_parameters).double()
    side.send_state(layout.gather(whole), layout.gather(-whole))
    gradient = side.receive_gradient()
    own = torch.tensor([float(side.number)]).double()
    sums = deciding.receive_sums() if first else None
    found = deciding.collect(Kind.FINITE, own) if first else side.report(Kind.FINITE, own)
    verdict = StepVerdict(goes_on=True, gamma=0.5, search=(0.5, 0.25, 1.0))
    if first:
        deciding.send_verdict(verdict)
    else:
        verdict = side.receive_verdict()
    usable = side.receive_usable()
    if first:
        deciding.send_gammas(decided=True)
    gammas = verdict.search if first else side.receive_gammas(verdict.search, verdict.gamma)
    if first:
        deciding.send_header(2, 0.25, MIRROR)
    side.send_directions(torch.stack([layout.gather(whole / 7), layout.gather(whole / 9)]))
    rows = torch.tensor([[float(place), -1.0] for place in plan.places[side.number]]).double()
    if not first:
        side.report(Kind.NUMBERS, rows)
        choice = side.receive_choice()
        return Served(gradient, usable, verdict, gammas, choice, (side.receive_choice(),))
    numbers = deciding.collect_blocks(Kind.NUMBERS, rows)
    fisher = deciding.receive_fisher(3)
    deciding.send_choice(CHOICE, search_open=True, measure=True)
    loss = deciding.receive_loss()
    deciding.send_header(0, None, MIRROR)
    deciding.send_choice(skipped_choice(0.5), search_open=False, measure=False)
    collected = (None, sums, found, numbers, fisher, loss)
    return Served(gradient, usable, verdict, gammas, CHOSEN, collected)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_step_of_the_protocol(num_shards):
    plan = plan_of(num_shards)
    assert len(plan) == num_shards
    groups = make_group(2, num_shards)
    calls = [lambda g=g: work(g, plan) for g in groups[:2]]
    calls += [lambda g=g: serve(g, plan) for g in groups[2:]]
    results = in_threads(calls)
    shards: list[Served] = results[2:]
    expected = gradient_of(0, plan) + gradient_of(1, plan)
    assert torch.equal(plan.whole([shard.gradient for shard in shards]), expected)
    for shard in shards:
        assert not shard.usable
        assert shard.verdict == StepVerdict(goes_on=True, gamma=0.5, search=(0.5, 0.25, 1.0))
        assert shard.gammas == (0.5, 0.25, 1.0)
        assert shard.choice == CHOSEN
        assert shard.collected[0] is None, "what is not applied has no coefficients"
    _, sums, found, numbers, fisher, loss = shards[0].collected
    assert (sums, loss) == ((3.0, 9), 3.0)
    assert [number.item() for number in found] == list(range(num_shards))
    assert numbers.tolist() == [[float(place), -1.0] for place in range(4)]
    assert torch.equal(fisher.packed(), torch.full((4, 3), 3.0).double())
    whole = torch.arange(plan.num_parameters).double()
    for state, directions, mirror, choice, skipped, not_applied in results[:2]:
        assert torch.equal(torch.stack(state), torch.stack([whole, -whole]))
        assert torch.equal(directions.vectors, torch.stack([whole / 7, whole / 9]))
        assert directions.fisher_fraction == 0.25
        assert DecisionMirror.from_numbers(mirror, 4) == MIRROR
        assert choice == CHOSEN
        assert (skipped, not_applied) == (None, None)


def test_a_search_that_is_not_decided_leaves_the_current_gamma():
    plan = plan_of(2)
    *_, first, second = make_group(1, 2)
    DecidingSide(first, plan, LIKE).send_gammas(decided=False)
    assert ShardSide(second, plan, LIKE).receive_gammas((1.0, 2.0), 1.5) == (1.5,)


@pytest.mark.parametrize("applied", [True, False])
def test_a_first_order_step_sends_the_new_parameters(applied):
    plan = plan_of(3)
    worker, *shards = make_group(1, 3)
    whole = torch.arange(plan.num_parameters).double()

    def update(group: Group) -> None:
        side = ShardSide(group, plan, LIKE)
        if side.number == 0:
            DecidingSide(group, plan, LIKE).send_header(int(applied), None, MIRROR)
        if applied:
            side.send_parameters(plan.layouts[side.number].gather(whole))
        group.finish_sending()

    receive = WorkerSide(worker, plan, LIKE).receive_parameters
    calls = [receive, *(lambda group=group: update(group) for group in shards)]
    received, *_ = in_threads(calls)
    assert torch.equal(received, whole) if applied else received is None
