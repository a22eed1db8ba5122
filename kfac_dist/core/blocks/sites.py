"""Sites: what the statistics of some blocks are computed from.

A site is a weight, a bias, or a weight with its bias, in all their uses: several modules that
share a parameter, or several calls of one module, are one site. Its whole matrix is cut into
blocks; most sites have just one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from kfac_dist.core.blocks.block import BlockKind, LayerBlock, Part, Range
from kfac_dist.core.blocks.layer_rules import LayerRule

WeightSharing = Literal["expand", "reduce"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Parameters with common statistics, and their blocks.

    `parameters` are the names of the weight and the bias, or of one of them; `owners` are the
    names of the modules that use them, each once for each use.

    The calls of `modules` are observed and read by `rule`. A diagonal site has neither, because
    its statistics are gradients of single cases; `why` is the reason for its being diagonal.

    `group` is the site's group in a grouped convolution, None if it has all channels.
    """

    kind: BlockKind
    parameters: tuple[str, ...]
    owners: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    rule: LayerRule[Any] | None
    has_weight: bool
    has_bias: bool
    blocks: tuple[LayerBlock, ...]
    group: int | None = None
    why: str = ""

    @property
    def first_row(self) -> int:
        """The row in the matrix of the whole layer where this site begins."""
        return min(block.rows[0] for block in self.blocks)

    @property
    def is_whole_linear_layer(self) -> bool:
        """Whether the site is one linear layer in one piece, with its weight, used only there."""
        return (
            self.rule is not None
            and self.rule.is_linear
            and self.has_weight
            and len(self.blocks) == len(self.modules) == 1
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parameters of a site as the matrix of a layer, [outputs, features + 1 for the bias].

    `weight` and `bias` are offsets in the parameter vector, None if the site lacks them. The
    weight itself is [outputs, features], or [features, outputs] if it is `transposed`.
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
        """Return the block of a rectangle; its name has the ranges unless it is the whole."""
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
            features = columns[0], min(columns[1], self.features)
            shape, height, width = (self.outputs, self.features), rows, features
            if self.transposed:
                shape, height, width = (self.features, self.outputs), features, rows
            yield Part(
                offset=self.weight,
                shape=shape,
                rows=height,
                columns=width,
                transposed=self.transposed,
            )
        if self.bias is not None and columns[1] > self.num_features:
            yield Part(offset=self.bias, shape=(self.outputs, 1), rows=rows, columns=(0, 1))


def cut(whole: Range, limit: int | None, parts: int = 1) -> list[Range]:
    """Cut a range into `parts` equal ranges, and each of these into nearly equal ones.

    No range is longer than `limit`, and there are as few as that allows.
    """
    length = (whole[1] - whole[0]) // parts
    starts = [whole[0] + part * length for part in range(parts)]
    num = 1 if limit is None else -(-length // limit)
    return [
        (start + length * i // num, start + length * (i + 1) // num)
        for start in starts
        for i in range(num)
    ]
