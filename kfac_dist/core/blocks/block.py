"""Curvature blocks: the rectangles of parameters that each block has, as one matrix.

The matrix of a Kronecker block is [dim_G, dim_A], outputs by inputs, with the bias as its last
column. The matrix of a block without factors is [units, k]; the k parameters in a row belong to
that unit alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BlockKind = Literal["kronecker", "kronecker, diagonal A", "unit-wise", "diagonal"]
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rectangle of one parameter, which begins at `offset` in the parameter vector.

    The parameter is read as a matrix of this `shape`. Then `rows` and `columns` are cut out of it,
    and the result is transposed if it is `transposed`.
    """

    offset: int
    shape: tuple[int, int]
    rows: Range
    columns: Range
    transposed: bool = False

    def view(self, vector: Tensor) -> Tensor:
        """Return this part of `vector` [P] as a view."""
        height, width = self.shape
        whole = vector[self.offset : self.offset + height * width].view(height, width)
        cut = whole[slice(*self.rows), slice(*self.columns)]
        return cut.T if self.transposed else cut

    @property
    def num_columns(self) -> int:
        """The number of columns of the view."""
        first, end = self.rows if self.transposed else self.columns
        return end - first


@dataclass(frozen=True, kw_only=True)
class LayerBlock:
    """One block of the curvature, whose matrix has the parts side by side.

    `rows` and `columns` are its ranges in the matrix of the whole layer.
    """

    name: str
    kind: BlockKind
    parts: tuple[Part, ...]
    rows: Range
    columns: Range

    @property
    def dim_A(self) -> int:
        """Order of A and columns of the matrix: inputs and the bias, or a unit's parameters."""
        return self.columns[1] - self.columns[0]

    @property
    def dim_G(self) -> int:
        """Order of G and rows of the matrix: outputs, or units."""
        return self.rows[1] - self.rows[0]

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of the matrices that are inverted one by one; none for blocks without factors."""
        if self.kind == "kronecker":
            return self.dim_A, self.dim_G
        return (self.dim_G,) if self.kind == "kronecker, diagonal A" else ()

    @property
    def cost(self) -> int:
        """Multiplications that one refresh of the inverse takes, up to a constant."""
        if self.kind in ("unit-wise", "diagonal"):
            return self.dim_G * self.dim_A**3
        linear = self.dim_A if self.kind == "kronecker, diagonal A" else 0
        return linear + sum(order**3 for order in self.orders)

    def matrix(self, vector: Tensor) -> Tensor:
        """Return this block's part of `vector` [P] as a matrix [dim_G, dim_A]."""
        views = [part.view(vector) for part in self.parts]
        return views[0] if len(views) == 1 else torch.cat(views, dim=1)

    def write(self, matrix: Tensor, vector: Tensor) -> None:
        """Write `matrix` [dim_G, dim_A] into this block's part of `vector` [P], in place."""
        widths = [part.num_columns for part in self.parts]
        for part, columns in zip(self.parts, torch.split(matrix, widths, dim=1), strict=True):
            part.view(vector).copy_(columns)
