"""The contestants: how each is started, its grid, and the package that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from timed_race import Runner, Setting

from peers import first_order
from peers.first_order import FirstOrderRunner
from peers.kfac_jax_runner import KfacJaxRunner
from peers.ours import SerialRunner

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One optimizer.

    `grid` holds the options to try before the race; without a trial, the first are used. `needs` is
    the module that must be installed. `ours` marks the optimizers of this project. `evaluations` is
    the number of evaluations in a race.
    """

    start: Callable[[Setting, Options], Runner]
    grid: tuple[Options, ...]
    needs: str | None = None
    ours: bool = False
    evaluations: int = 7

    @property
    def installed(self) -> bool:
        """Return whether it can take part."""
        return self.needs is None or find_spec(self.needs) is not None


def _first_order(
    make: Callable[[float], first_order.Optimizers],
    learning_rates: tuple[float, ...],
    needs: str | None = None,
) -> Contestant:
    return Contestant(
        start=lambda setting, options: FirstOrderRunner(setting, make(options["lr"])),
        grid=tuple({"lr": lr} for lr in learning_rates),
        needs=needs,
    )


def _ours(changes: Options) -> Contestant:
    return Contestant(start=SerialRunner, grid=(changes,), ours=True, evaluations=9)


# Small batches and little damping at the start, where noise matters less than the number of steps.
# Inverses are refreshed twice as often as by default, which costs a few per cent of a step.
_FAST: Options = {
    "batch_size": {"schedule": "exponential", "initial": 250, "full_at": 900},
    "optimizer.damping.initial": 0.1,
    "optimizer.inverse_update_period": 10,
    "optimizer.statistics_fraction": 0.125,
    "optimizer.fisher_fraction": "auto",
    "optimizer.max_factor_dim": 512,
    "optimizer.averaging": {"decay": 0.9, "start": 100},
}
_NORM_CONSTRAINT: Options = _FAST | {
    "optimizer.step_rule": "norm_constraint",
    "optimizer.lr": 0.03,
    "optimizer.momentum": 0.7,
    "optimizer.norm_constraint": 0.1,
    "optimizer.damping": {
        "initial": {"schedule": "exponential", "initial": 0.1, "final": 3e-4, "steps": 150},
        "adapt_period": None,
    },
}
del _NORM_CONSTRAINT["optimizer.damping.initial"]

FIELD: Mapping[str, Contestant] = {
    "sgd": _first_order(first_order.sgd, (3e-3, 1e-3, 1e-2)),
    "adam": _first_order(first_order.adam, (1e-3, 3e-4, 3e-3)),
    "muon": _first_order(first_order.muon, (0.08, 0.16, 0.32, 0.04)),
    "soap": _first_order(first_order.soap, (1e-2, 3e-3, 3e-2), "pytorch_optimizer"),
    "shampoo": _first_order(first_order.shampoo, (1e-3, 3e-4, 3e-3), "pytorch_optimizer"),
    "kfac-jax": Contestant(
        start=lambda setting, options: KfacJaxRunner(setting, **options),
        grid=tuple(
            {"initial_damping": damping, "inverse_period": period}
            for damping, period in ((3.0, 5), (0.3, 5), (3.0, 20))
        ),
        needs="kfac_jax",
        evaluations=9,
    ),
    "kfac": _ours(_FAST),
    "kfac, the example": _ours({}),
    "kfac, norm_constraint": _ours(_NORM_CONSTRAINT),
}
