"""From gradients to directions, with the inverses of one or several gammas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.inverse.precondition import LayerInverse
from kfac_dist.core.inverse.structure import Structure
from kfac_dist.core.products import RoundedCopies


class DirectionComputer:
    """Preconditions the gradients of some blocks, by the `structure` of their inverses."""

    def __init__(self, settings: KFACSpec, structure: Structure[Any]) -> None:
        self._structure = structure
        self._copies = RoundedCopies() if settings.precondition_dtype == "bfloat16" else None

    def compute(
        self,
        gradient: Mapping[str, Tensor],
        inverses: Sequence[Mapping[str, LayerInverse]],
        gammas: Sequence[float],
    ) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
        """Return one direction for each set of inverses, each block's as [dim_G, dim_A].

        Also the blocks that fell back to the gradient in any of them.
        """
        if self._copies is not None:
            inverses = self._copies.round(inverses)
        tried = [
            self._structure.precondition(gradient, by_layer, gamma)
            for by_layer, gamma in zip(inverses, gammas, strict=True)
        ]
        fallen = dict.fromkeys(name for _, names in tried for name in names)
        return [directions for directions, _ in tried], tuple(fallen)
