"""Block vectors: the matrices of some blocks, one after the other in one flat vector.

A parameter server's shard owns whole blocks, and a block is seldom one piece of the parameter
vector [P]. In a block vector [Q] it is: its matrix [dim_G, dim_A] by rows. Every block begins at a
cache line, so a product or a sum over it rounds in the same way whichever blocks lie before it.
The gaps are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock

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

    def matrices(self, values: Tensor) -> dict[str, Tensor]:
        """Return each block's matrix [dim_G, dim_A] in a block vector [Q], as views."""
        return {
            block.name: values[start : start + block.dim_G * block.dim_A].view(
                block.dim_G, block.dim_A
            )
            for block, start in zip(self.blocks, self._starts, strict=True)
        }

    def gather(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the blocks of a parameter vector [P] as a block vector [Q].

        It is a new one, or `out`, whose gaps are zero already.
        """
        gathered = vector.new_zeros(self.size) if out is None else out
        for block, matrix in zip(self.blocks, self.matrices(gathered).values(), strict=True):
            block.read(vector, matrix)
        return gathered

    def scatter(self, values: Tensor, vector: Tensor) -> None:
        """Write the blocks of a block vector [Q] to their places in `vector` [P]."""
        self.write_parameters(self.matrices(values), vector)

    def write_parameters(self, matrices: Mapping[str, Tensor], vector: Tensor) -> None:
        """Write each block's matrix to its places in `vector` [P]."""
        for block in self.blocks:
            block.write(matrices[block.name], vector)

    def write(self, matrices: Mapping[str, Tensor], values: Tensor) -> None:
        """Write each block's matrix into a block vector [Q]."""
        for name, place in self.matrices(values).items():
            place.copy_(matrices[name])
