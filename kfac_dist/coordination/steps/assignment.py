"""Which inverse worker owns which layers?

`assign` and `reassign` balance the time that inversions take, `assign_runs` does so for layers that
form a chain (docs/algorithm.md#block-tridiagonal).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import InvalidSpecError

Assignment = dict[int, tuple[str, ...]]
"""The names of the layers of each inverse worker, by its id."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """A layer and the orders of the matrices that are inverted for it; some layers have none."""

    name: str
    orders: tuple[int, ...]

    def __post_init__(self) -> None:
        for order in self.orders:
            check_interval(f"order of a matrix of {self.name}", order, 1)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The time in seconds to invert a matrix of order d: `cubic d^3 + quadratic d^2`."""

    cubic: float
    quadratic: float

    def __post_init__(self) -> None:
        check_interval("cubic", self.cubic, 0)
        check_interval("quadratic", self.quadratic, 0)

    def matrix_seconds(self, order: int) -> float:
        """Return the time to invert one matrix."""
        return self.cubic * order**3 + self.quadratic * order**2

    def layer_seconds(self, layer: LayerCost) -> float:
        """Return the time to invert all matrices of a layer."""
        return sum(self.matrix_seconds(order) for order in layer.orders)


# Fitted to float32 factors of order 256 to 2048 on one thread. It serves on other machines too,
# since only the ratios of costs matter.
DEFAULT_COST_MODEL = CostModel(cubic=1.2e-11, quadratic=2.4e-8)


def fit_cost_model(samples: Collection[tuple[int, float]]) -> CostModel:
    """Fit the model to measured `(order, seconds)` by least squares, with no negative coefficient.

    Samples of a single order cannot tell the two terms apart; they are fitted by the cubic one.

    Raises:
        InvalidSpecError: `samples` is empty, or a sample is out of range.
    """
    if not samples:
        raise InvalidSpecError("a cost model needs at least 1 measured (order, seconds); got 0")
    for dim, seconds in samples:
        check_interval("order", dim, 1)
        if not 0 < seconds < math.inf:
            raise InvalidSpecError(
                f"seconds of order {dim} must be above 0 and finite; got {seconds}"
            )
    # Exact arithmetic: the normal equations of orders close to each other are nearly singular.
    exact = [(dim, Fraction(seconds)) for dim, seconds in samples]
    s6, s5, s4 = (sum(dim**power for dim, _ in exact) for power in (6, 5, 4))
    t3, t2 = (sum(dim**power * seconds for dim, seconds in exact) for power in (3, 2))
    determinant = s6 * s4 - s5 * s5  # 0 when there is a single order
    cubic, quadratic = t3 * s4 - t2 * s5, t2 * s6 - t3 * s5
    if determinant == 0 or quadratic < 0:
        return CostModel(cubic=float(t3 / s6), quadratic=0.0)
    if cubic < 0:
        return CostModel(cubic=0.0, quadratic=float(t2 / s4))
    return CostModel(cubic=float(cubic / determinant), quadratic=float(quadratic / determinant))


def assign(
    layers: Sequence[LayerCost],
    workers: int | Sequence[int],
    model: CostModel = DEFAULT_COST_MODEL,
) -> Assignment:
    """Give each layer to one worker: the longest first, always to the least loaded worker.

    `workers` is their number (ids from 0) or their ids. The largest load is at most 4/3 of that of
    the best assignment (Graham's bound). Ties go in the given order, so the result depends on
    nothing else. A worker's layers are in the order of `layers`. With more workers than layers,
    some workers have no layer.

    Raises:
        InvalidSpecError: there is no worker, or a name or id occurs twice.
    """
    ids = range(workers) if isinstance(workers, int) else workers
    return reassign({}, layers, ids, model)


def reassign(
    assignment: Mapping[int, Sequence[str]],
    layers: Sequence[LayerCost],
    workers: Sequence[int],
    model: CostModel = DEFAULT_COST_MODEL,
) -> Assignment:
    """Return an assignment to `workers` that moves few layers of the present one.

    Layers without a present worker are given out as by `assign`. The other layers stay, except
    those that move to a worker that joined: it takes layers from the most loaded worker, the
    longest first, as long as its own load stays below the load that the other one had.

    Args:
        assignment: the present assignment; workers in it may have left.
        layers: all layers, old and new.
        workers: the ids of all workers from now on.
        model: the cost of a layer.

    Raises:
        InvalidSpecError: there is no worker, or a name or id occurs twice.
    """
    check_interval("number of inverse workers", len(workers), 1)
    _check_unique("inverse worker", workers)
    _check_unique("layer", [layer.name for layer in layers])
    seconds = {layer.name: model.layer_seconds(layer) for layer in layers}
    held = {
        worker: [name for name in assignment.get(worker, ()) if name in seconds]
        for worker in workers
    }
    placed = {name for names in held.values() for name in names}
    homeless = [name for name in seconds if name not in placed]
    for name in sorted(homeless, key=seconds.__getitem__, reverse=True):
        min(held.values(), key=lambda names: _load(names, seconds)).append(name)
    stayed = [held[worker] for worker in workers if worker in assignment]
    for worker in workers:
        if stayed and worker not in assignment:
            _unload(stayed, held[worker], seconds)
    return {worker: tuple(n for n in seconds if n in held[worker]) for worker in workers}


def assign_runs(
    layers: Sequence[LayerCost],
    workers: int | Sequence[int],
    model: CostModel = DEFAULT_COST_MODEL,
) -> Assignment:
    """Give each worker a run of consecutive layers, with the smallest possible largest load.

    This is for layers that form a chain. The owner of a layer also needs statistics of the next
    layer, which it then nearly always owns itself. When workers join or leave, call this again.
    With more workers than layers, some workers have no layer.

    Raises:
        InvalidSpecError: there is no worker, or a name or id occurs twice.
    """
    ids = list(range(workers) if isinstance(workers, int) else workers)
    check_interval("number of inverse workers", len(ids), 1)
    _check_unique("inverse worker", ids)
    names = [layer.name for layer in layers]
    _check_unique("layer", names)
    cuts = _best_cuts([model.layer_seconds(layer) for layer in layers], len(ids))
    return {
        worker: tuple(names[start:stop])
        for worker, (start, stop) in zip(ids, pairwise(cuts), strict=True)
    }


def _best_cuts(seconds: Sequence[float], num_runs: int) -> list[int]:
    """Return where the runs start, and the end of the last one; the largest run is minimal."""
    sums = list(accumulate(seconds, initial=0.0))
    # Dynamic programming over the number of runs. best[stop] is for the layers before `stop`: the
    # largest load of a run, and the cuts that achieve it.
    best = [(total, [0, stop]) for stop, total in enumerate(sums)]
    for _ in range(num_runs - 1):
        best = [
            min(
                (max(best[cut][0], total - sums[cut]), [*best[cut][1], stop])
                for cut in range(stop + 1)
            )
            for stop, total in enumerate(sums)
        ]
    return best[-1][1]


def _unload(others: list[list[str]], joined: list[str], seconds: Mapping[str, float]) -> None:
    """Move layers of the most loaded worker to the worker that joined, while that helps."""
    while True:
        fullest = max(others, key=lambda names: _load(names, seconds))
        margin = _load(fullest, seconds) - _load(joined, seconds)
        fitting = [name for name in fullest if seconds[name] < margin]
        if not fitting:
            return
        moved = max(fitting, key=seconds.__getitem__)
        fullest.remove(moved)
        joined.append(moved)


def _load(names: Sequence[str], seconds: Mapping[str, float]) -> float:
    return sum(seconds[name] for name in names)


def _check_unique(what: str, values: Sequence[object]) -> None:
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if twice:
        raise InvalidSpecError(f"{what} {twice[0]} is given more than once")
