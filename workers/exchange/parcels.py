"""The tensors of layers as they travel: arrays by name, symmetric matrices as packed triangles.

The name of an array says whether it is packed (`core.packing`), so a parcel can be opened without
knowing the kind of layer. `workers.exchange.messages` puts a header beside each parcel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, Link, PackedFactors
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.packing import pack_symmetric, unpack_symmetric
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.core.vector import all_finite
from workers.exchange.arrays import Arrays, to_array, to_arrays, to_tensor, to_tensors


def pack_tensors(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return the tensors as arrays, symmetric ones as triangles; the others share their memory."""
    return to_arrays(pack_symmetric(tensors))


def unpack_tensors(arrays: Arrays, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the tensors that `pack_tensors` packed, as new tensors."""
    return unpack_symmetric(to_tensors(arrays, device))


class StatisticsParcel(NamedTuple):
    """Sums of factors by layer, and sums of cross factors by the first layer of a link."""

    factors: Mapping[str, Arrays]
    crosses: Mapping[str, Arrays]

    def part(self, layers: Sequence[str], links: Sequence[Link]) -> StatisticsParcel:
        """Return what the inverses of `layers` need.

        A layer with a link also needs the factors of the layer it is linked to.
        """
        own = {link.name: link for link in links if link.name in layers}
        needed = dict.fromkeys([*layers, *(link.next_name for link in own.values())])
        return StatisticsParcel(
            factors={name: self.factors[name] for name in needed},
            crosses={name: self.crosses[name] for name in own},
        )


def pack_statistics(statistics: BatchStatistics) -> StatisticsParcel:
    """Pack factors and cross factors; a tensor that layers share is packed and sent once."""
    packed: dict[int, Arrays] = {}

    def pack_once(name: str, tensor: Tensor) -> Arrays:
        if id(tensor) not in packed:
            packed[id(tensor)] = pack_tensors({name: tensor})
        return packed[id(tensor)]

    return StatisticsParcel(
        factors={
            layer: dict(
                item
                for name, tensor in pair.tensors().items()
                for item in pack_once(name, tensor).items()
            )
            for layer, pair in statistics.factors.items()
        },
        # The prefix keeps cross factors from being packed: they are not symmetric.
        crosses={
            name: {f"cross_{key}": to_array(tensor) for key, tensor in pair.tensors().items()}
            for name, pair in statistics.crosses.items()
        },
    )


class ReceivedStatistics(NamedTuple):
    """Sums as the averages take them in: factors stay packed."""

    factors: Mapping[str, PackedFactors]
    crosses: Mapping[str, KroneckerPair]

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        parts: list[PackedFactors | KroneckerPair] = [
            *self.factors.values(),
            *self.crosses.values(),
        ]
        return all_finite(tensor for part in parts for tensor in part.tensors().values())


def read_statistics(
    parcel: StatisticsParcel, device: torch.device | None = None
) -> ReceivedStatistics:
    """Return the sums in a parcel as new tensors on `device`, by default the CPU."""
    return ReceivedStatistics(
        factors={
            name: PackedFactors(packed=to_tensors(arrays, device))
            for name, arrays in parcel.factors.items()
        },
        crosses={
            name: KroneckerPair(
                A=to_tensor(arrays["cross_A"]).to(device), G=to_tensor(arrays["cross_G"]).to(device)
            )
            for name, arrays in parcel.crosses.items()
        },
    )


def add_up(parcels: Sequence[StatisticsParcel]) -> StatisticsParcel:
    """Return the sum of parcels that hold the same layers, added in the order given."""
    return StatisticsParcel(
        factors=_add_layers([parcel.factors for parcel in parcels]),
        crosses=_add_layers([parcel.crosses for parcel in parcels]),
    )


def _add_layers(parts: Sequence[Mapping[str, Arrays]]) -> Mapping[str, Arrays]:
    return {name: _add([part[name] for part in parts]) for name in parts[0]}


def _add(parts: Sequence[Arrays]) -> Arrays:
    total = dict(parts[0])
    for part in parts[1:]:
        for name, array in part.items():
            total[name] = total[name] + array
    return total


class InverseParcel(NamedTuple):
    """The tensors of a layer's inverses for several gammas.

    `shared` holds the tensors that all of them have in common, `own` the others, one entry for
    each inverse.
    """

    shared: Arrays
    own: Sequence[Arrays]


def pack_inverses(inverses: Sequence[Inverted[Any]]) -> InverseParcel:
    """Pack the inverses of one layer, made for different gammas."""
    tensors = [inverted.inverse.tensors() for inverted in inverses]
    shared = {
        name: tensor
        for name, tensor in (tensors[0] if tensors else {}).items()
        if all(other.get(name) is tensor for other in tensors)
    }
    return InverseParcel(
        shared=pack_tensors(shared),
        own=[
            pack_tensors({name: tensor for name, tensor in own.items() if name not in shared})
            for own in tensors
        ],
    )


def unpack_inverses(parcel: InverseParcel, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each inverse; tensors that were shared are shared again."""
    shared = unpack_tensors(parcel.shared, device)
    for own in parcel.own:
        yield shared | unpack_tensors(own, device)
