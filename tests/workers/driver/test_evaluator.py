"""When a training that has done all its steps counts as diverged."""

from __future__ import annotations

import math

import pytest

from workers.driver.evaluator import divergence


@pytest.mark.parametrize(
    ("initial", "final"),
    [(2.3, 2.3e6), (2.3, 30.0), (-1.0, 12.0), (2.3, math.inf), (None, math.nan), (0.0, 0.5)],
)
def test_a_far_worse_objective_is_named_with_both_ends(initial: float | None, final: float) -> None:
    said = divergence(initial, final)
    assert said is not None
    assert "diverged" in said
    assert f"{final:.4g}" in said
    if math.isfinite(final):
        assert f"{initial:.4g}" in said


@pytest.mark.parametrize(
    ("initial", "final"),
    [(2.3, 0.1), (2.3, 4.0), (-5.0, -50.0), (1e-9, 1e-6), (None, 3.0), (math.nan, 3.0)],
)
def test_a_better_or_similar_objective_is_not(initial: float | None, final: float) -> None:
    assert divergence(initial, final) is None
