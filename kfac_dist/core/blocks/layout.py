"""Block vectors: the parameters of some blocks, one block after the other in one flat vector.

A parameter server's shard owns whole blocks, and a block is seldom one piece of the parameter
vector [P]. In a block vector [Q] it is: its parts one after the other, such as a weight and then
its bias, each by rows. Every block begins at a cache line, so a sum over it rounds in the same way
whichever blocks lie before it. The gaps are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock, Part

_ALIGNED = 32  # elements; two cache lines of float32


class BlockLayout:
    """Where `blocks` lie in a block vector of length `size`, in this order."""

    def __init__(self, blocks: Sequence[LayerBlock]) -> None:
        self.blocks = tuple(blocks)
        self._starts: list[int] = []
        self.size = 0
        for block in self.blocks:
            self._starts.append(self.size)
            lines = -(-block.dim_G * block.dim_A // _ALIGNED)
            self.size += lines * _ALIGNED

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(block.name for block in self.blocks)

    def regions(self, values: Tensor) -> dict[str, Tensor]:
        """Return each block's piece [dim_G * dim_A] of a block vector [Q], as a view."""
        return {
            block.name: values[start : start + block.dim_G * block.dim_A]
            for block, start in zip(self.blocks, self._starts, strict=True)
        }

    def matrices(self, values: Tensor) -> dict[str, Tensor]:
        """Return each block's matrix [dim_G, dim_A]; a view of `values` [Q] if it is one part."""
        matrices = {}
        for block, start in zip(self.blocks, self._starts, strict=True):
            views = [view for _, view in _parts(block, values, start)]
            matrices[block.name] = views[0] if len(views) == 1 else torch.cat(views, dim=1)
        return matrices

    def write(self, matrices: Mapping[str, Tensor], values: Tensor) -> None:
        """Write each block's matrix into a block vector [Q]."""
        for block, start in zip(self.blocks, self._starts, strict=True):
            first = 0
            for _, view in _parts(block, values, start):
                width = view.shape[1]
                view.copy_(matrices[block.name][:, first : first + width])
                first += width

    def gather(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the blocks of a parameter vector [P] as a block vector [Q].

        It is a new one, or `out`, whose gaps are zero already.
        """
        gathered = vector.new_zeros(self.size) if out is None else out
        for block, start in zip(self.blocks, self._starts, strict=True):
            for part, view in _parts(block, gathered, start):
                view.copy_(part.view(vector))
        return gathered

    def scatter(self, values: Tensor, vector: Tensor) -> None:
        """Write the blocks of a block vector [Q] to their places in `vector` [P]."""
        for block, start in zip(self.blocks, self._starts, strict=True):
            for part, view in _parts(block, values, start):
                part.view(vector).copy_(view)


def _parts(block: LayerBlock, values: Tensor, start: int) -> Iterator[tuple[Part, Tensor]]:
    """Yield the parts of a block, and each one's place [dim_G, columns] in a block vector."""
    for part in block.parts:
        end = start + block.dim_G * part.num_columns
        yield part, values[start:end].view(block.dim_G, part.num_columns)
        start = end
