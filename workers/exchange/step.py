"""The protocol of one step between the gradient workers and the parameter server.

    gradient workers                              parameter server
    1  send_gradient      -- sum [P], [2] -->     receive_gradient
    1a send_usable        -- sum [1] -->          receive_usable       (when statistics are due)
    1b send               -- sum [moments] -->    receive              (when statistics are due)
    2  receive_directions <-- broadcast [2], [C, P] --  send_directions, or skip_step
    3  send_fisher        -- sum [C+2, C+1] -->   receive_fisher       (when the rule needs it)
    4  receive_choice     <-- broadcast [5] --    send_choice
    5  both apply   update = mu previous - alpha directions[candidate]
    5b receive_bases      <-- broadcast [L, 2], [bases that changed] --  send_bases
    6  send_loss          -- sum [1] -->          receive_loss         (when a measure is due)

P is the number of parameters, C the number of directions, L the number of layers. All sums run
over the cases of the whole batch. Small numbers travel in float64, exactly as the server has them,
so that all members do the same arithmetic.

The workers compute their statistics between 1 and 1a. Meanwhile the server preconditions, if it
already has every inverse that the step may use.

1b and 5b are for EKFAC only (`workers.exchange.moments`). In 1b the workers send the second
moments of the gradients of single cases, in the bases of the inverses in use; the server averages
them into those inverses before it admits newer ones. In 5b it sends the bases of the inverses that
the step used. A member that joins receives all bases at once.

First-order optimizers use 1, and then only `receive_parameters` <-- broadcast [2], [P] --
`send_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.compute import GradientSums
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.step.choice import Choice
from workers.exchange.process_group import Group

_SKIP = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class BatchSums:
    """Sums over the batch, at the server: `loss` float64, `gradient` [P]."""

    loss: float
    num_cases: int
    gradient: Tensor


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
    """The server's choice of direction, step size and momentum, as the workers need it."""

    candidate: int
    alpha: float
    mu: float
    measure: bool


class WorkerSide:
    """A gradient worker's side; `like` is any tensor with the dtype and device of the parameters.

    Every method raises PeerLostError if another member is gone.
    """

    def __init__(self, group: Group, num_parameters: int, like: Tensor) -> None:
        self._group = group
        self._num_parameters = num_parameters
        self._like = like

    def send_gradient(self, sums: GradientSums, num_cases: int) -> None:
        """Send the sums over this worker's part of the batch."""
        self._group.send(sums.gradient)
        self._group.send(_numbers(float(sums.loss), num_cases))

    def send_usable(self, usable: bool) -> None:
        """Send whether the statistics of this worker's part were finite."""
        self._group.send(_numbers(usable))

    def receive_directions(self) -> Directions | None:
        """Return the directions, None if the step is skipped."""
        count, fraction = self._receive_header()
        if count == 0:
            return None
        vectors = self._receive(count, self._num_parameters)
        return Directions(vectors=vectors, fisher_fraction=fraction or None)

    def send_fisher(self, sums: FisherSums) -> None:
        """Send the Fisher products of the C directions and the previous update."""
        self._group.send(sums.packed())

    def receive_choice(self) -> Coefficients | None:
        """Return what was chosen, None if the step is not applied."""
        numbers = self._group.broadcast(_numbers(*[0.0] * 5)).tolist()
        applied, candidate, alpha, mu, measure = numbers
        if not applied:
            return None
        return Coefficients(candidate=int(candidate), alpha=alpha, mu=mu, measure=bool(measure))

    def send_loss(self, loss_sum: Tensor) -> None:
        """Send the sum of the losses at the new parameters, float64 []."""
        self._group.send(loss_sum.reshape(1))

    def receive_parameters(self) -> Tensor | None:
        """Return the new parameters [P], None if the step is skipped."""
        count, _ = self._receive_header()
        return None if count == 0 else self._receive(self._num_parameters)

    def receive_state(self) -> tuple[Tensor, Tensor]:
        """Return parameters and previous update, [P] each, when this worker joins."""
        parameters, previous = self._receive(2, self._num_parameters)
        # Memory of their own, as at the server: how a product rounds depends on alignment.
        return parameters.clone(), previous.clone()

    def _receive_header(self) -> tuple[int, float]:
        count, fraction = self._group.broadcast(_numbers(*_SKIP)).tolist()
        return int(count), fraction

    def _receive(self, *shape: int) -> Tensor:
        received = self._group.broadcast(self._like.new_empty(shape))
        return received.to(self._like.device)


class ServerSide:
    """The parameter server's side; its methods answer those of `WorkerSide`."""

    def __init__(self, group: Group, num_parameters: int, like: Tensor) -> None:
        self._group = group
        self._num_workers = group.size - 1
        self._num_parameters = num_parameters
        self._like = like
        self._gradients = group.new_parts(like.new_empty(num_parameters))

    def receive_gradient(self) -> BatchSums:
        """Return the sums over the batch; the next call overwrites their memory."""
        gradient = self._group.receive_sum_into(self._gradients)
        loss, num_cases = self._group.receive_sum(_numbers(0.0, 0.0)).tolist()
        return BatchSums(
            loss=loss, num_cases=int(num_cases), gradient=gradient.to(self._like.device)
        )

    def receive_usable(self) -> bool:
        """Return whether the statistics of every worker were finite."""
        return self._group.receive_sum(_numbers(0.0)).item() == self._num_workers

    def skip_step(self) -> None:
        """Tell the workers that this step is skipped."""
        self._group.broadcast(_numbers(*_SKIP))

    def send_directions(self, directions: Directions) -> None:
        """Send the directions."""
        fraction = directions.fisher_fraction or 0.0
        self._group.broadcast(_numbers(len(directions.vectors), fraction))
        self._group.broadcast(directions.vectors)

    def receive_fisher(self, num_vectors: int) -> FisherSums:
        """Return the Fisher products of all vectors, summed over the Fisher cases."""
        sums = FisherSums.zero(num_vectors, self._like).packed()
        return FisherSums.unpacked(self._group.receive_sum(sums).to(self._like.device))

    def send_choice(self, choice: Choice, *, measure: bool) -> None:
        """Send the coefficients, or that the step is not applied."""
        self._group.broadcast(
            _numbers(choice.applied, choice.candidate, choice.alpha, choice.mu, measure)
        )

    def receive_loss(self) -> float:
        """Return the sum of the losses at the new parameters."""
        return float(self._group.receive_sum(_numbers(0.0)).item())

    def send_parameters(self, parameters: Tensor) -> None:
        """Send the new parameters [P]."""
        self._group.broadcast(_numbers(1.0, 0.0))
        self._group.broadcast(parameters)

    def send_state(self, parameters: Tensor, previous_update: Tensor) -> None:
        """Send parameters and previous update, [P] each."""
        self._group.broadcast(torch.stack([parameters, previous_update]))


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
