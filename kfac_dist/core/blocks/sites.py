"""Sites: what the statistics of some blocks are computed from.

A site is a weight, a bias, or a weight with its bias, in all their uses: several modules that
share a parameter, or several calls of one module, are one site. Its whole matrix is cut into
blocks, most often one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from kfac_dist.core.blocks.block import BlockKind, LayerBlock, Part, Range

WeightSharing = Literal["expand", "reduce"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Parameters with common statistics, and the blocks that they have.

    `modules` are those whose calls are observed, none of a diagonal site: its statistics are the
    gradients of single cases. `group` is the one of a grouped convolution, None for all channels.
    `parameters` are names; `why` tells the reason for a diagonal block.
    """

    kind: BlockKind
    parameters: tuple[str, ...]
    owners: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    has_weight: bool
    has_bias: bool
    blocks: tuple[LayerBlock, ...]
    group: int | None = None
    why: str = ""

    @property
    def first_row(self) -> int:
        """Where the rows of this site begin in the matrix of the whole layer."""
        return min(block.rows[0] for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parameters of a site as the matrix of a layer.

    `weight` and `bias` are offsets in the parameter vector, None where there is none. The weight
    is [outputs, features]; of an embedding [features, outputs], `transposed`.
    """

    name: str
    kind: BlockKind
    outputs: int
    features: int
    weight: int | None
    bias: int | None
    transposed: bool = False

    @property
    def num_columns(self) -> int:
        """Columns of the matrix: the features, and 1 for the bias."""
        return self.num_features + (self.bias is not None)

    @property
    def num_features(self) -> int:
        """Columns of the weight."""
        return 0 if self.weight is None else self.features

    def block(self, rows: Range, columns: Range, *, whole: bool) -> LayerBlock:
        """Return the block of a rectangle, named by it unless it is the whole matrix."""
        place = "" if whole else f"[{rows[0]}:{rows[1]},{columns[0]}:{columns[1]}]"
        return LayerBlock(
            name=self.name + place,
            kind=self.kind,
            parts=tuple(self._parts(rows, columns)),
            rows=rows,
            columns=columns,
        )

    def _parts(self, rows: Range, columns: Range) -> Iterator[Part]:
        if self.weight is not None and columns[0] < self.features:
            cut = columns[0], min(columns[1], self.features)
            if self.transposed:
                shape, rows_of_weight, columns_of_weight = (self.features, self.outputs), cut, rows
            else:
                shape, rows_of_weight, columns_of_weight = (self.outputs, self.features), rows, cut
            yield Part(
                offset=self.weight,
                shape=shape,
                rows=rows_of_weight,
                columns=columns_of_weight,
                transposed=self.transposed,
            )
        if self.bias is not None and columns[1] > self.num_features:
            yield Part(offset=self.bias, shape=(self.outputs, 1), rows=rows, columns=(0, 1))


def cut(whole: Range, limit: int | None, parts: int = 1) -> list[Range]:
    """Cut a range into `parts` equal ranges, each into the fewest nearly equal ones of `limit`."""
    length = (whole[1] - whole[0]) // parts
    starts = [whole[0] + part * length for part in range(parts)]
    num = 1 if limit is None else -(-length // limit)
    return [
        (start + length * i // num, start + length * (i + 1) // num)
        for start in starts
        for i in range(num)
    ]
