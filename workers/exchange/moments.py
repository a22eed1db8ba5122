"""EKFAC's part of a step's protocol: bases go to the gradient workers, moments come back.

Each shard of the parameter server owns the moments of its layers. The bases are those of the
inverses in use; each is sent once, and all gradient workers hold the same ones, in the same
order. What moments are: docs/algorithm.md#ekfac.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair
from workers.exchange.process_group import Group, Kind


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

    `layers` are those of each shard, none of any if the structure has no moments: then nothing is
    exchanged. `like` is any tensor with the dtype and device of the parameters. Every method
    raises PeerLostError if another member is gone.
    """

    def __init__(self, group: Group, layers: Sequence[Sequence[str]], like: Tensor) -> None:
        self._group = group
        self._layers = layers
        self._like = like
        self._by_shard: list[dict[str, KroneckerPair]] = [{} for _ in layers]

    @property
    def bases(self) -> dict[str, KroneckerPair]:
        """The bases in which moments are to be computed, by layer."""
        return {name: basis for bases in self._by_shard for name, basis in bases.items()}

    def send(self, moments: Mapping[str, Tensor] | None) -> None:
        """Send each shard the sums over this worker's part, in `bases`; None counts as zeros."""
        for bases, rank in zip(self._by_shard, self._group.shards, strict=True):
            if not bases:
                continue
            sums = [
                self._like.new_zeros(len(basis.G) * len(basis.A))
                if moments is None
                else moments[name].reshape(-1)
                for name, basis in bases.items()
            ]
            self._group.send(Kind.MOMENTS, torch.cat(sums), rank)

    def receive_bases(self) -> None:
        """Replace the bases that have changed."""
        for number, (layers, rank) in enumerate(zip(self._layers, self._group.shards, strict=True)):
            if layers:
                self._by_shard[number] |= self._receive_bases(layers, rank)

    def _receive_bases(self, layers: Sequence[str], rank: int) -> dict[str, KroneckerPair]:
        # The header has the orders of each layer's basis, zeros where it has not changed.
        orders = self._group.receive_numbers(Kind.BASES_HEADER, 2 * len(layers), rank)
        changed = {
            name: (int(order_A), int(order_G))
            for name, order_A, order_G in zip(layers, orders[::2], orders[1::2], strict=True)
            if order_A
        }
        if not changed:
            return {}
        sizes = [order**2 for pair in changed.values() for order in pair]
        into = torch.empty(sum(sizes), dtype=self._like.dtype, device=self._group.device)
        flat = self._group.receive(Kind.BASES, into, rank).to(self._like.device)
        matrices = iter(torch.split(flat, sizes))
        bases = {}
        for name, (order_A, order_G) in changed.items():
            # Cloned, because BLAS may round differently for memory that is aligned differently.
            Q_A = next(matrices).view(order_A, order_A).clone()
            Q_G = next(matrices).view(order_G, order_G).clone()
            bases[name] = KroneckerPair(A=Q_A, G=Q_G)
        return bases


class ShardMoments:
    """A shard's side; its methods answer those of `WorkerMoments`. `layers` are the shard's own."""

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
        parts = self._group.new_parts(self._like.new_empty(sum(sizes)))
        flat = self._group.receive_sum(Kind.MOMENTS, parts).to(self._like.device)
        split = zip(self._sent.items(), torch.split(flat, sizes), strict=True)
        return {
            name: Moments(version_step=basis.version_step, sums=part.view(shapes[name]))
            for (name, basis), part in split
        }

    def send_bases(self, bases: Mapping[str, Basis]) -> None:
        """Send the `bases` that the workers do not have yet."""
        if not self._layers:
            return
        changed = {name: bases[name] for name in self._layers if self._is_new(name, bases)}
        header: list[float] = []
        for name in self._layers:
            pair = changed[name].pair if name in changed else None
            header += [float(len(pair.A)), float(len(pair.G))] if pair else [0.0, 0.0]
        self._group.send_numbers(Kind.BASES_HEADER, header, self._group.workers)
        if changed:
            matrices = [m for basis in changed.values() for m in (basis.pair.A, basis.pair.G)]
            flat = torch.cat([matrix.reshape(-1) for matrix in matrices])
            for rank in self._group.workers:
                self._group.send(Kind.BASES, flat, rank)
        self._sent |= changed

    def _is_new(self, name: str, bases: Mapping[str, Basis]) -> bool:
        sent = self._sent.get(name)
        return name in bases and (sent is None or sent.version_step != bases[name].version_step)
