"""Which gradient worker adds up which layers' statistics?

The statistics of a layer are summed over the gradient workers by one of them, and sent once to the
inverse worker that owns the layer. It is the same one in every step: the messages of one process
arrive in order, those of several do not, and an inverse worker that was stopped finds all of them
waiting. A later step that came first would make the earlier one late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfac_dist.coordination.checks import check_interval


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one inverse worker that are summed and sent together."""

    number: int
    inverse_worker: int
    layers: tuple[str, ...]

    def summed_by(self, num_workers: int) -> int:
        """Return the gradient worker that adds the group up."""
        return self.number % num_workers


def layer_groups(
    assignment: Mapping[int, Sequence[str]], sizes: Mapping[str, int], num_workers: int
) -> tuple[LayerGroup, ...]:
    """Return the groups into which the layers of all inverse workers are divided.

    There are about as many groups as gradient workers, so that each has its share of the sums. A
    group's layers are neighbours in the order of the inverse worker.

    Args:
        assignment: the layers of each inverse worker, in the order of the model.
        sizes: how many numbers each layer's statistics have.
        num_workers: the number of gradient workers.
    """
    check_interval("num_workers", num_workers, 1)
    owners = [rank for rank, layers in assignment.items() if layers]
    groups: list[LayerGroup] = []
    for rank in owners:
        pieces = -(-num_workers // len(owners))
        for layers in _cut(assignment[rank], sizes, pieces):
            groups.append(LayerGroup(number=len(groups), inverse_worker=rank, layers=layers))
    return tuple(groups)


def _cut(layers: Sequence[str], sizes: Mapping[str, int], pieces: int) -> list[tuple[str, ...]]:
    """Cut a sequence of layers into at most `pieces` runs of about the same size."""
    total = sum(sizes[name] for name in layers)
    runs: list[list[str]] = [[] for _ in range(pieces)]
    before = 0
    for name in layers:
        middle = before + sizes[name] / 2
        runs[min(int(middle * pieces / total), pieces - 1) if total else 0].append(name)
        before += sizes[name]
    return [tuple(run) for run in runs if run]
