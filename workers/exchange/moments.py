"""EKFAC's part of a step's protocol: bases go to the gradient workers, moments come back.

The parameter server owns the moments. The bases are those of the inverses in use; each is sent
once, and every member of the group holds the same ones, in the same order. What moments are:
docs/algorithm.md#ekfac.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair
from workers.exchange.process_group import Group


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The basis Q_A, Q_G of a layer's inverse in use, and the version of that inverse."""

    version_step: int
    pair: KroneckerPair


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over the statistics cases of a batch [dim_G, dim_A], in the basis of that version."""

    version_step: int
    sums: Tensor


class WorkerMoments:
    """A gradient worker's side; `bases` are the ones it was sent last.

    `layers` are all layers of the model. Without layers the structure has no moments, and nothing
    is exchanged. `like` is any tensor with the dtype and device of the parameters. Every method
    raises PeerLostError if another member is gone.
    """

    def __init__(self, group: Group, layers: Sequence[str], like: Tensor) -> None:
        self._group = group
        self._layers = layers
        self._like = like
        self.bases: dict[str, KroneckerPair] = {}

    def send(self, moments: Mapping[str, Tensor] | None) -> None:
        """Send the sums over this worker's part, in `bases`; None counts as zeros."""
        if not self.bases:
            return
        sums = [
            self._like.new_zeros(len(basis.G) * len(basis.A))
            if moments is None
            else moments[name].reshape(-1)
            for name, basis in self.bases.items()
        ]
        self._group.send(torch.cat(sums))

    def receive_bases(self) -> None:
        """Replace the bases that have changed."""
        if not self._layers:
            return
        # The header has the orders of each layer's basis, zeros where it has not changed.
        header = torch.zeros((len(self._layers), 2), dtype=torch.int64)
        orders = self._group.broadcast(header).tolist()
        changed = {
            name: (order_A, order_G)
            for name, (order_A, order_G) in zip(self._layers, orders, strict=True)
            if order_A
        }
        if not changed:
            return
        sizes = [order**2 for pair in changed.values() for order in pair]
        flat = self._group.broadcast(self._like.new_empty(sum(sizes))).to(self._like.device)
        matrices = iter(torch.split(flat, sizes))
        for name, (order_A, order_G) in changed.items():
            # Cloned, because BLAS may round differently for memory that is aligned differently.
            Q_A = next(matrices).view(order_A, order_A).clone()
            Q_G = next(matrices).view(order_G, order_G).clone()
            self.bases[name] = KroneckerPair(A=Q_A, G=Q_G)


class ServerMoments:
    """The parameter server's side; its methods answer those of `WorkerMoments`."""

    def __init__(self, group: Group, layers: Sequence[str], like: Tensor) -> None:
        self._group = group
        self._layers = layers
        self._like = like
        self._sent: dict[str, Basis] = {}

    def receive(self) -> dict[str, Moments]:
        """Return the sums over the batch, by layer, in the bases sent so far."""
        if not self._sent:
            return {}
        shapes = {
            name: (len(basis.pair.G), len(basis.pair.A)) for name, basis in self._sent.items()
        }
        sizes = [rows * columns for rows, columns in shapes.values()]
        flat = self._group.receive_sum(self._like.new_empty(sum(sizes))).to(self._like.device)
        parts = zip(self._sent.items(), torch.split(flat, sizes), strict=True)
        return {
            name: Moments(version_step=basis.version_step, sums=part.view(shapes[name]))
            for (name, basis), part in parts
        }

    def send_bases(self, bases: Mapping[str, Basis]) -> None:
        """Send the `bases` that the workers do not have yet."""
        if not self._layers:
            return
        changed = {name: bases[name] for name in self._layers if self._is_new(name, bases)}
        header = [
            (len(changed[name].pair.A), len(changed[name].pair.G)) if name in changed else (0, 0)
            for name in self._layers
        ]
        self._group.broadcast(torch.tensor(header))
        if changed:
            matrices = [m for basis in changed.values() for m in (basis.pair.A, basis.pair.G)]
            self._group.broadcast(torch.cat([matrix.reshape(-1) for matrix in matrices]))
        self._sent |= changed

    def _is_new(self, name: str, bases: Mapping[str, Basis]) -> bool:
        sent = self._sent.get(name)
        return name in bases and (sent is None or sent.version_step != bases[name].version_step)
