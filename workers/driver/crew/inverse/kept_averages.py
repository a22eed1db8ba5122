"""The newest averages of factors that outlive the inverse workers which made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.core.packing import LOWER, unpack
from workers.exchange.arrays import Array, to_array, to_tensor

_STEP = ":step"


class KeptAverages:
    """Averages by layer, for successors and checkpoints; those at the start are a checkpoint's."""

    def __init__(self, averages: Mapping[str, Array]) -> None:
        self._averages = dict(averages)

    def of_layers(self, names: Sequence[str]) -> dict[str, Array]:
        """Return what is known of these layers."""
        starts = tuple(f"{name}:" for name in names)
        return {key: array for key, array in self._averages.items() if key.startswith(starts)}

    def known(self) -> dict[str, Array]:
        """Return the newest averages that are known of every layer; some may be packed."""
        return dict(self._averages)

    def keep(self, averages: Mapping[str, Array]) -> None:
        """Replace what is known of the layers in `averages`; names of arrays may differ."""
        new = tuple(key.removesuffix("step") for key in averages if key.endswith(_STEP))
        self._averages = {k: v for k, v in self._averages.items() if not k.startswith(new)}
        self._averages |= averages

    def newest_step(self, layers: Sequence[str]) -> int:
        """Return the newest step whose statistics are in the averages of these layers."""
        return newest_step(self._averages, layers)


def newest_step(averages: Mapping[str, Array], layers: Sequence[str]) -> int:
    """Return the newest step whose statistics are in averages of these layers, 0 without any."""
    return max((int(averages.get(f"{name}{_STEP}", 0)) for name in layers), default=0)


def unpack_averages(averages: Mapping[str, Array]) -> dict[str, Array]:
    """Return averages as checkpoints have them: no matrix is packed."""
    return {
        name.removesuffix(LOWER): to_array(unpack(to_tensor(array)))
        if name.endswith(LOWER)
        else array
        for name, array in averages.items()
    }
