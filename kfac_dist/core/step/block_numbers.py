"""Inner products of whole vectors, formed block by block and added in the order of the model.

A parameter server in shards has no whole vector in one place. So every process, the serial
optimizer too, forms these numbers in the same pieces: then the number of shards changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DirectionNumbers:
    """Inner products of the whole vectors, for C directions.

    `gradient_previous` is that of the gradient and the previous update, `previous_previous` the
    square of the previous update. `directions` has one triple a direction: with the gradient, with
    itself, with the previous update.
    """

    gradient_previous: float
    previous_previous: float
    directions: tuple[tuple[float, float, float], ...]


def block_numbers(
    gradient: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    previous_update: Mapping[str, Tensor],
) -> Tensor:
    """Return the inner products of each block, float64 [B, 2 + 3C], on the device of the blocks.

    All arguments map the same B blocks to their pieces [dim_G * dim_A] of block vectors. The
    columns are those of `DirectionNumbers`.
    """
    rows = [
        _row(own, [direction[name] for direction in directions], previous_update[name])
        for name, own in gradient.items()
    ]
    return torch.stack(rows).double()


def _row(gradient: Tensor, directions: Sequence[Tensor], previous: Tensor) -> Tensor:
    products = [torch.dot(gradient, previous), torch.dot(previous, previous)]
    for direction in directions:
        products += [
            torch.dot(gradient, direction),
            torch.dot(direction, direction),
            torch.dot(direction, previous),
        ]
    return torch.stack(products)


def block_squares(regions: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of each block's piece of a block vector, float64 [B]."""
    return torch.stack([torch.dot(values, values) for values in regions]).double()


def add_up(numbers: Tensor) -> list[float]:
    """Return the sums over the blocks of `numbers` [B, K], added in the order of the rows."""
    first, *others = numbers.tolist()  # one transfer to the host
    totals: list[float] = first
    for row in others:
        totals = [total + number for total, number in zip(totals, row, strict=True)]
    return totals


def direction_numbers(numbers: Tensor) -> DirectionNumbers:
    """Return the numbers of the whole vectors from those of all blocks, [B, 2 + 3C]."""
    gradient_previous, previous_previous, *others = add_up(numbers)
    triples = zip(others[::3], others[1::3], others[2::3], strict=True)
    return DirectionNumbers(
        gradient_previous=gradient_previous,
        previous_previous=previous_previous,
        directions=tuple(triples),
    )


def total_square(squares: Tensor) -> float:
    """Return the sum of the squares [B] of all blocks."""
    return add_up(squares.unsqueeze(1))[0]
