"""The parameters of a model as one vector, as the serial optimizer needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.step.block_numbers import block_numbers, block_squares, total_square
from kfac_dist.core.vector import flatten
from kfac_dist.errors import InvalidSpecError


class FlatParameters:
    """The parameters [P], read again whenever they are asked for, and their blocks by `layout`."""

    def __init__(self, parameters: Sequence[nn.Parameter], layout: BlockLayout, l2: float) -> None:
        self._parameters = parameters
        self._layout = layout
        self._l2 = l2
        self._theta = flatten(parameters)
        self._gathered: dict[str, Tensor] = {}  # block vectors [Q]

    def read(self) -> Tensor:
        """Return the current parameters [P], in memory that the next call overwrites."""
        return flatten(self._parameters, self._theta)

    def check_same_size(self, saved: Tensor) -> None:
        """Check that a saved vector is as long as the parameters.

        Raises:
            InvalidSpecError: it is not.
        """
        if saved.numel() != self._theta.numel():
            raise InvalidSpecError(
                f"the state is of another model: it has {saved.numel()} parameters, this one has "
                f"{self._theta.numel()}"
            )

    def l2_term(self, theta: Tensor) -> float:
        """Return (l2 / 2) ||theta||^2, summed block by block."""
        if self._l2 == 0:
            return 0.0
        regions = self._layout.regions(self.gather(theta, "parameters"))
        return 0.5 * self._l2 * total_square(block_squares(regions.values()))

    def gather(self, vector: Tensor, use: str) -> Tensor:
        """Return `vector` [P] as a block vector [Q]; the next call for this `use` overwrites it."""
        return self._layout.gather(vector, self._memory(use))

    def _memory(self, use: str) -> Tensor:
        # New memory costs more, page by page, than copying to it.
        if use not in self._gathered:
            self._gathered[use] = self._theta.new_zeros(self._layout.size)
        return self._gathered[use]

    def directions(self, solved: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Return directions, given by block, as vectors [C, P] and as block vectors [Q].

        The next call overwrites the block vectors.
        """
        vectors = self._theta.new_empty((len(solved), len(self._theta)))
        by_block = [self._memory(f"direction {number}") for number in range(len(solved))]
        for matrices, own, vector in zip(solved, by_block, vectors, strict=True):
            self._layout.write(matrices, own)
            self._layout.scatter(own, vector)
        return vectors, by_block

    def numbers(self, gradient: Tensor, directions: Sequence[Tensor], previous: Tensor) -> Tensor:
        """Return `block_numbers` of block vectors [Q]; `previous` is a vector [P]."""
        regions = self._layout.regions
        before = self.gather(previous, "previous update")
        return block_numbers(
            regions(gradient), [regions(values) for values in directions], regions(before)
        )
