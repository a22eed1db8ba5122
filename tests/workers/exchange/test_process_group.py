"""The protocol over real gloo connections, and the errors when a member is gone."""

from __future__ import annotations

import time

import pytest
import torch

from kfac_dist.core.compute import GradientSums
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.step.choice import Choice
from tests.workers.whole_jobs.local_job import in_threads, make_group
from workers.exchange.process_group import Group, PeerLostError
from workers.exchange.step import Directions, ServerSide, WorkerSide

LIKE = torch.zeros(1, dtype=torch.float64)


def test_a_step_of_the_protocol():
    groups = make_group(2)
    workers = [WorkerSide(group, 3, LIKE) for group in groups[:2]]
    server = ServerSide(groups[2], 3, LIKE)

    def work(rank: int) -> tuple:
        side = workers[rank]
        loss = torch.tensor(1.0 + rank, dtype=torch.float64)
        gradient = torch.arange(3, dtype=torch.float64) + rank
        side.send_gradient(GradientSums(loss, gradient), 4 + rank)
        side.send_usable(rank == 0)
        directions = side.receive_directions()
        products = torch.full((4, 3), 1.0 + rank, dtype=torch.float64)
        side.send_fisher(FisherSums.unpacked(products))
        choice = side.receive_choice()
        side.send_loss(loss)
        return directions, choice, side.receive_directions()

    def serve() -> tuple:
        sums = server.receive_gradient()
        usable = server.receive_usable()
        vectors = torch.arange(6, dtype=torch.float64).view(2, 3) / 7
        server.send_directions(Directions(vectors=vectors, fisher_fraction=0.25))
        fisher = server.receive_fisher(3)
        choice = Choice(
            candidate=1,
            gamma=1.0,
            alpha=1 / 3,
            mu=-1e-17,
            update_norm=1.0,
            predicted_change=None,
            prediction_for_ratio=None,
        )
        server.send_choice(choice, measure=True)
        loss = server.receive_loss()
        server.skip_step()
        return (sums, usable), vectors, fisher, choice, loss

    *mirrors, ((sums, usable), vectors, fisher, choice, loss) = in_threads(
        [lambda: work(0), lambda: work(1), serve]
    )
    assert (sums.loss, sums.num_cases, usable) == (3.0, 9, False)
    assert sums.gradient.tolist() == [1.0, 3.0, 5.0]
    assert torch.equal(fisher.packed(), torch.full((4, 3), 3.0, dtype=torch.float64))
    assert loss == 3.0
    for directions, received, skipped in mirrors:
        assert torch.equal(directions.vectors, vectors)
        assert directions.fisher_fraction == 0.25
        assert (received.candidate, received.alpha, received.mu) == (1, choice.alpha, choice.mu)
        assert received.measure
        assert skipped is None


def take_part_in_sum(group: Group) -> None:
    if group.rank == group.server:
        group.receive_sum(torch.zeros(3))
    else:
        group.send(torch.zeros(3))
        group.broadcast(torch.zeros(3))


def test_the_others_see_at_once_that_a_member_has_left():
    groups = make_group(2, timeout_seconds=60.0)
    groups[0].leave()
    started = time.monotonic()

    def others(group: Group) -> None:
        # A worker notices it in the first of its calls that needs the server.
        with pytest.raises(PeerLostError, match=rf"(recv|send|broadcast) in rank {group.rank}"):
            take_part_in_sum(group)
        group.leave()

    in_threads([lambda group=group: others(group) for group in groups[1:]])
    assert time.monotonic() - started < 10
    with pytest.raises(PeerLostError, match="has been left"):
        groups[0].broadcast(torch.zeros(3))


def test_a_silent_member_is_an_error_at_the_timeout():
    _worker, server = make_group(1, timeout_seconds=1.0)
    with pytest.raises(PeerLostError):
        server.receive_sum(torch.zeros(3))
