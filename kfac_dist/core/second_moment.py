"""Sums of outer products."""

from __future__ import annotations

from torch import Tensor

# Columns computed at a time: narrower panels save more, and are multiplied less efficiently.
_PANEL = 256


def add_second_moment(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Add `weight X^T X` of `rows` X [n, d] to the symmetric `total` [d, d], in place.

    Panel by panel of the lower triangle, which is all that needs to be computed; what is above the
    panels is copied.
    """
    order = len(total)
    for start in range(0, order, _PANEL):
        end = min(start + _PANEL, order)
        panel = total[start:end, :end]
        panel.addmm_(rows[:, start:end].T, rows[:, :end], alpha=weight)
        total[:start, start:end] = panel[:, :start].T
