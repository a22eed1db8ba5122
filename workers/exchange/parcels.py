"""The tensors of layers as they travel: arrays by name, symmetric matrices as packed triangles.

The name of an array says whether it is packed (`core.packing`), so a parcel can be opened without
knowing the kind of layer. `workers.exchange.messages` puts a header beside each parcel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, Link, PackedFactors
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.packing import pack_symmetric, unpack_symmetric
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.core.vector import all_finite
from workers.exchange.arrays import Array, Arrays, to_arrays, to_tensor, to_tensors
from workers.exchange.host_copies import HostCopies


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

    def with_values(self, values: Array) -> StatisticsParcel:
        """Return a parcel of the same names and shapes with other `values`, in one flat array."""
        arrays = flat_arrays(self)
        starts = np.cumsum([0, *(array.size for array in arrays)])
        replaced = {
            id(array): values[start : start + array.size].reshape(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        }

        def layers(by_layer: Mapping[str, Arrays]) -> dict[str, Arrays]:
            return {
                layer: {name: replaced[id(array)] for name, array in own.items()}
                for layer, own in by_layer.items()
            }

        return StatisticsParcel(factors=layers(self.factors), crosses=layers(self.crosses))


class StatisticsOnTheWay:
    """Packed factors and cross factors that leave their device; copied and sent once if shared."""

    def __init__(self, statistics: BatchStatistics, copies: HostCopies) -> None:
        self._numbers: dict[int, int] = {}  # of a tensor in the copy, by its id
        packed: list[Tensor] = []
        self._factors = {
            layer: dict(self._add(name, tensor, packed) for name, tensor in pair.tensors().items())
            for layer, pair in statistics.factors.items()
        }
        # The prefix keeps cross factors from being packed: they are not symmetric.
        self._crosses = {
            name: dict(
                self._add(f"cross_{key}", tensor, packed) for key, tensor in pair.tensors().items()
            )
            for name, pair in statistics.crosses.items()
        }
        self._copy = copies.start(packed)

    def _add(self, name: str, tensor: Tensor, packed: list[Tensor]) -> tuple[str, int]:
        """Return the name of a tensor when it is packed, and its number."""
        ((packed_name, values),) = pack_symmetric({name: tensor}).items()
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(packed)
            packed.append(values)
        return packed_name, self._numbers[id(tensor)]

    def parcel(self) -> StatisticsParcel:
        """Return the parcel, once it is on the host; it may not be read after `release`."""
        arrays = self._copy.arrays()

        def values(numbers: Mapping[str, int]) -> Arrays:
            return {name: arrays[number] for name, number in numbers.items()}

        return StatisticsParcel(
            factors={layer: values(numbers) for layer, numbers in self._factors.items()},
            crosses={name: values(numbers) for name, numbers in self._crosses.items()},
        )

    def release(self) -> None:
        """Let the memory of the copy be used again."""
        self._copy.release()


def pack_statistics(statistics: BatchStatistics) -> StatisticsParcel:
    """Pack factors and cross factors that are on the CPU."""
    return StatisticsOnTheWay(statistics, HostCopies(torch.device("cpu"))).parcel()


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


def merged(parcels: Sequence[StatisticsParcel]) -> StatisticsParcel:
    """Return what several parcels hold; a layer that is in several has the same sums in all."""
    return StatisticsParcel(
        factors={name: arrays for parcel in parcels for name, arrays in parcel.factors.items()},
        crosses={name: arrays for parcel in parcels for name, arrays in parcel.crosses.items()},
    )


def flat_arrays(parcel: StatisticsParcel) -> list[Array]:
    """Return the arrays of a parcel in an order that depends on its names alone, each once."""
    arrays: dict[int, Array] = {}
    for by_name in (parcel.factors, parcel.crosses):
        for layer in by_name.values():
            arrays |= {id(array): array for array in layer.values()}
    return list(arrays.values())


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
