"""The protocol of one step between the gradient workers and the shards of the parameter server.

    gradient workers          shards                            the first shard, which decides
    1  send_gradient  ------> receive_gradient  (slices)   and  receive_sums     (loss, cases)
    2                         report_finite  ----------------->  collect_finite
                              receive_verdict  <---------------  send_verdict     (skip? search?)
    2a send_usable, moments-> receive_usable, moments            (when statistics are due)
    2b                        report_complete  --------------->  collect_complete (in a search)
                              receive_gammas  <----------------  send_gammas
    3  receive_header  <---------------------------------------  send_header      (candidates)
       receive_directions <-- send_directions   (slices)
    3a                        report_numbers  ---------------->  collect_numbers  (by block)
    4  send_fisher  ------------------------------------------>  receive_fisher   (if needed)
    5  receive_choice  <----  receive_choice  <----------------  send_choice
    6  all apply   update = mu previous - alpha directions[candidate]
    6a receive_bases  <-----  send_bases                         (EKFAC)
    7  send_loss  -------------------------------------------->  receive_loss     (if measured)
                              report_squares  ---------------->  collect_squares

A slice is what a shard owns of a vector [P], as a block vector [Q] (`core.blocks.layout`). Sums run
over the cases of the whole batch and are added in the order of the workers' ranks; numbers of
whole vectors are added in the order of the model's blocks. So the number of shards changes no bit.
Small numbers travel in float64, exactly as they are, so that all members do the same arithmetic.

The workers compute their statistics between 1 and 2a. Meanwhile a shard preconditions, if it
already has every inverse that the step may use.

2a's moments and 6a are for EKFAC only (`workers.exchange.moments`). First-order optimizers use 1
and 2, and then only `receive_parameters` <-- `send_parameters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.compute import GradientSums
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.step.choice import Choice
from workers.exchange.decisions import MIRROR_SIZE, DecisionMirror
from workers.exchange.process_group import Group, Kind
from workers.exchange.shard_plan import ShardPlan

_MOST_GAMMAS = 3


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The preconditioned gradients [C, P].

    `fisher_fraction` is the fraction of the batch for which the server wants the Fisher products,
    None if it wants none.
    """

    vectors: Tensor
    fisher_fraction: float | None


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The choice of direction, step size and momentum, as all members need it.

    `search_open`: inverses for all gammas of a search are still kept.
    """

    candidate: int
    alpha: float
    mu: float
    gamma: float
    search_open: bool
    measure: bool


@dataclass(frozen=True, kw_only=True)
class StepVerdict:
    """Whether a step continues after its gradient was seen, and at which gammas.

    `search` are the gammas of a search that can be decided in this step, empty without one;
    `gamma` is the current one.
    """

    goes_on: bool
    gamma: float
    search: tuple[float, ...]


class WorkerSide:
    """A gradient worker's side; `like` is any tensor with the dtype and device of the parameters.

    `mirror` is what the deciding shard told last (`workers.exchange.decisions`). Every method
    raises PeerLostError if another member is gone.
    """

    def __init__(self, group: Group, plan: ShardPlan, like: Tensor) -> None:
        self._group = group
        self._plan = plan
        self._like = like
        self._slices = [like.new_zeros(layout.size) for layout in plan.layouts]
        self.mirror: list[float] | None = None

    def send_gradient(self, sums: GradientSums, num_cases: int) -> None:
        """Send the sums over this worker's part of the batch."""
        self._group.finish_sending()  # the slices of the step before
        numbers = [float(sums.loss), float(num_cases)]
        self._group.send_numbers(Kind.SUMS, numbers, [self._group.decider])
        for layout, values, rank in self._shards():
            self._group.send(Kind.GRADIENT, layout.gather(sums.gradient, values), rank)

    def _shards(self) -> list[tuple[BlockLayout, Tensor, int]]:
        return list(zip(self._plan.layouts, self._slices, self._group.shards, strict=True))

    def send_usable(self, usable: bool) -> None:
        """Send whether the statistics of this worker's part were finite."""
        self._group.send_numbers(Kind.USABLE, [float(usable)], self._group.shards)

    def receive_directions(self) -> Directions | None:
        """Return the directions, None if the step is skipped."""
        count, fraction = self._receive_header()
        if count == 0:
            return None
        vectors = self._receive(Kind.DIRECTIONS, count)
        return Directions(vectors=vectors, fisher_fraction=fraction or None)

    def send_fisher(self, sums: FisherSums) -> None:
        """Send the Fisher products of the C directions and the previous update."""
        self._group.send(Kind.FISHER, sums.packed(), self._group.decider)

    def receive_choice(self) -> Coefficients | None:
        """Return what was chosen, None if the step is not applied."""
        return _receive_choice(self._group)

    def send_loss(self, loss_sum: Tensor) -> None:
        """Send the sum of the losses at the new parameters, float64 []."""
        self._group.send(Kind.LOSS, loss_sum.reshape(1), self._group.decider)

    def receive_parameters(self) -> Tensor | None:
        """Return the new parameters [P], None if the step is skipped."""
        count, _ = self._receive_header()
        return self._receive(Kind.PARAMETERS, 1)[0] if count else None

    def _receive_header(self) -> tuple[int, float]:
        numbers = self._group.receive_numbers(Kind.HEADER, 2 + MIRROR_SIZE, self._group.decider)
        count, fraction, *mirror = numbers
        self.mirror = mirror
        return int(count), fraction

    def receive_state(self) -> tuple[Tensor, Tensor]:
        """Return parameters and previous update, [P] each, when this worker joins."""
        parameters, previous = self._receive(Kind.STATE, 2)
        # Memory of their own, as in other processes: how a product rounds may depend on alignment.
        return parameters.clone(), previous.clone()

    def receive_averages(self) -> dict[int, tuple[int, Tensor | None]]:
        """Return, by shard, the averages that this worker is to mirror when it joins.

        Each is the number of averaged iterates and the average [Q], None before the first.
        """
        averages: dict[int, tuple[int, Tensor | None]] = {}
        for shard, (layout, _, rank) in enumerate(self._shards()):
            if mirror_of(shard, self._group) != self._group.rank:
                continue
            (count,) = self._group.receive_numbers(Kind.AVERAGE_STATE, 1, rank)
            value = None
            if count:
                into = torch.empty(layout.size, dtype=self._like.dtype, device=self._group.device)
                value = self._group.receive(Kind.AVERAGE, into, rank).to(self._like.device)
            averages[shard] = (int(count), value)
        return averages

    def _receive(self, kind: Kind, count: int) -> Tensor:
        """Return `count` vectors [count, P] from the slices of all shards."""
        into = [
            torch.empty((count, layout.size), dtype=self._like.dtype, device=self._group.device)
            for layout in self._plan.layouts
        ]
        received = self._group.receive_all(kind, list(zip(into, self._group.shards, strict=True)))
        vectors = self._like.new_empty((count, self._plan.num_parameters))
        for layout, slices in zip(self._plan.layouts, received, strict=True):
            for values, vector in zip(slices.to(self._like.device), vectors, strict=True):
                layout.scatter(values, vector)
        return vectors


class ShardSide:
    """A shard's side of the exchange with the gradient workers and with the deciding shard.

    `like` is any tensor with the dtype and device of the parameters, `layout` that of the shard.
    """

    def __init__(self, group: Group, plan: ShardPlan, like: Tensor) -> None:
        self._group = group
        self._like = like
        self.number = group.rank - group.decider
        self._layout = plan.layouts[self.number]
        self._gradients = group.new_parts(like.new_empty(self._layout.size))

    def receive_gradient(self) -> Tensor:
        """Return the sum of the slices over the batch; the next call overwrites its memory."""
        self._group.finish_sending()  # what was sent in the step before
        return self._group.receive_sum(Kind.GRADIENT, self._gradients).to(self._like.device)

    def receive_usable(self) -> bool:
        """Return whether the statistics of every worker were finite."""
        (count,) = self._group.sum_numbers(Kind.USABLE, 1)
        return count == len(self._group.workers)

    def report(self, kind: Kind, numbers: Tensor) -> None:
        """Send numbers of this shard's blocks to the deciding shard, float64 [...]."""
        if self.number > 0:
            self._group.send(kind, numbers, self._group.decider)

    def receive_shared(self) -> bool:
        """Return the fact that the deciding shard shares with those that join."""
        (value,) = self._group.receive_numbers(Kind.BEGIN, 1, self._group.decider)
        return bool(value)

    def receive_verdict(self) -> StepVerdict:
        """Return how the step continues."""
        numbers = self._group.receive_numbers(Kind.VERDICT, 3 + _MOST_GAMMAS, self._group.decider)
        goes_on, gamma, count, *gammas = numbers
        return StepVerdict(goes_on=bool(goes_on), gamma=gamma, search=tuple(gammas[: int(count)]))

    def receive_gammas(self, search: Sequence[float], gamma: float) -> tuple[float, ...]:
        """Return the gammas that the step tries: all of a search, or the current one alone."""
        (decided,) = self._group.receive_numbers(Kind.GAMMAS, 1, self._group.decider)
        return tuple(search) if decided else (gamma,)

    def send_directions(self, slices: Tensor) -> None:
        """Send this shard's slices of the directions [C, Q] to all workers."""
        self._send_to_workers(Kind.DIRECTIONS, slices)

    def receive_choice(self) -> Coefficients | None:
        """Return what was chosen, None if the step is not applied."""
        return _receive_choice(self._group)

    def send_parameters(self, parameters: Tensor) -> None:
        """Send this shard's slice of the new parameters [Q]."""
        self._send_to_workers(Kind.PARAMETERS, parameters.unsqueeze(0))

    def send_state(self, parameters: Tensor, previous_update: Tensor) -> None:
        """Send this shard's slices of parameters and previous update, [Q] each."""
        self._send_to_workers(Kind.STATE, torch.stack([parameters, previous_update]))

    def send_average(self, num_averaged: int, average: Tensor | None) -> None:
        """Send the average [Q] to the worker that mirrors it; None before the first iterate."""
        mirror = mirror_of(self.number, self._group)
        count = 0 if average is None else num_averaged
        self._group.send_numbers(Kind.AVERAGE_STATE, [float(count)], [mirror])
        if average is not None:
            self._group.send(Kind.AVERAGE, average, mirror)

    def _send_to_workers(self, kind: Kind, tensor: Tensor) -> None:
        for rank in self._group.workers:
            self._group.send(kind, tensor, rank)


class DecidingSide:
    """The first shard's side of the exchange with the other shards and all workers.

    What concerns this shard itself does not travel.
    """

    def __init__(self, group: Group, plan: ShardPlan, like: Tensor) -> None:
        self._group = group
        self._plan = plan
        self._like = like
        self._others = group.shards[1:]

    def receive_sums(self) -> tuple[float, int]:
        """Return the sum of the losses over the batch, and the number of cases."""
        loss, num_cases = self._group.sum_numbers(Kind.SUMS, 2)
        return loss, int(num_cases)

    def collect(self, kind: Kind, own: Tensor) -> list[Tensor]:
        """Return the numbers that each shard has reported, float64 [...], in order.

        Those of all shards have the shape of `own`.
        """
        return self._collect(kind, own, [own.shape] * len(self._others))

    def collect_blocks(self, kind: Kind, own: Tensor) -> Tensor:
        """Return numbers of all blocks [B, ...] in the model's order, from those of each shard."""
        shapes = [(len(layout.blocks), *own.shape[1:]) for layout in self._plan.layouts[1:]]
        return self._plan.in_model_order(self._collect(kind, own, shapes))

    def _collect(self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        into = [
            torch.empty(tuple(shape), dtype=torch.float64, device=self._group.device)
            for shape in shapes
        ]
        received = self._group.receive_all(kind, list(zip(into, self._others, strict=True)))
        return [own.cpu(), *(numbers.cpu() for numbers in received)]

    def share(self, value: bool) -> bool:
        """Tell the other shards a fact when they join, and return it."""
        self._group.send_numbers(Kind.BEGIN, [float(value)], self._others)
        return value

    def send_verdict(self, verdict: StepVerdict) -> None:
        """Tell the other shards how the step continues."""
        padding = [0.0] * (_MOST_GAMMAS - len(verdict.search))
        numbers = [
            float(verdict.goes_on),
            verdict.gamma,
            float(len(verdict.search)),
            *verdict.search,
            *padding,
        ]
        self._group.send_numbers(Kind.VERDICT, numbers, self._others)

    def send_gammas(self, *, decided: bool) -> None:
        """Tell the other shards whether the search is decided in this step."""
        self._group.send_numbers(Kind.GAMMAS, [float(decided)], self._others)

    def send_header(
        self, num_directions: int, fisher_fraction: float | None, mirror: DecisionMirror
    ) -> None:
        """Announce the directions, or new parameters, to the workers; 0 skips the step."""
        numbers = [float(num_directions), fisher_fraction or 0.0, *mirror.numbers()]
        self._group.send_numbers(Kind.HEADER, numbers, self._group.workers)

    def receive_fisher(self, num_vectors: int) -> FisherSums:
        """Return the Fisher products of all vectors, summed over the Fisher cases."""
        like = FisherSums.zero(num_vectors, self._like).packed()
        total = self._group.receive_sum(Kind.FISHER, self._group.new_parts(like))
        return FisherSums.unpacked(total.to(self._like.device))

    def send_choice(self, choice: Choice, *, search_open: bool, measure: bool) -> None:
        """Send the coefficients to all members, or that the step is not applied."""
        numbers = [
            float(choice.applied),
            float(choice.candidate),
            choice.alpha,
            choice.mu,
            choice.gamma,
            float(search_open),
            float(measure),
        ]
        self._group.send_numbers(Kind.CHOICE, numbers, [*self._group.workers, *self._others])

    def receive_loss(self) -> float:
        """Return the sum of the losses at the new parameters."""
        (loss,) = self._group.sum_numbers(Kind.LOSS, 1)
        return loss


def mirror_of(shard: int, group: Group) -> int:
    """Return the rank of the gradient worker that mirrors what else a shard owns.

    It is not the one that may share the shard's process, unless there is no other.
    """
    return (shard + 1) % len(group.workers)


def _receive_choice(group: Group) -> Coefficients | None:
    numbers = group.receive_numbers(Kind.CHOICE, 7, group.decider)
    applied, candidate, alpha, mu, gamma, search_open, measure = numbers
    if not applied:
        return None
    return Coefficients(
        candidate=int(candidate),
        alpha=alpha,
        mu=mu,
        gamma=gamma,
        search_open=bool(search_open),
        measure=bool(measure),
    )
