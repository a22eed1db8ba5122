"""The drift of factors, by which the refresh policy `largest_drift` chooses."""

from __future__ import annotations

import math

import torch

from kfac_dist.core.factors import FactorAverages, KroneckerPair
from workers.inverse_worker.drift import FactorDrift, relative_change


def pair(a: float, g: float) -> KroneckerPair:
    return KroneckerPair(A=a * torch.eye(3), G=g * torch.eye(2))


def change(old: KroneckerPair, new: KroneckerPair) -> float:
    return relative_change(old.tensors(), new.tensors())


def test_the_largest_relative_change_of_a_factor_counts():
    assert change(pair(2, 1), pair(3, 1)) == 0.5
    assert change(pair(2, 1), pair(3, 3)) == 2
    assert change(pair(2, 1), pair(2, 1)) == 0
    assert change(pair(0, 0), pair(0, 0)) == 0
    assert change(pair(0, 1), pair(1, 1)) == math.inf
    assert change(pair(3e38, 1), pair(-3e38, 1)) == math.inf


def test_drift_grows_from_the_factors_that_were_inverted():
    averages, drift = FactorAverages(["fc"], factor_decay=0.5), FactorDrift()
    averages.update(1, {"fc": pair(4, 4)}, 4)
    assert drift.since_inverted("fc", averages) == 0
    drift.start_from("fc", averages.pair("fc").tensors())
    assert drift.since_inverted("fc", averages) == 0
    averages.update(2, {"fc": pair(12, 4)}, 4)
    assert drift.since_inverted("fc", averages) == 1
    drift.start_from("fc", averages.pair("fc").tensors())
    assert drift.since_inverted("fc", averages) == 0
