import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.core.step.plane_model import PlaneModel

NUMBERS = st.floats(-10, 10, allow_nan=False)


def plane(slopes, squares, fisher):
    return PlaneModel(slopes=slopes, squares=squares, fisher=fisher)


@given(
    a=st.tuples(NUMBERS, NUMBERS, NUMBERS), b=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    ridge=st.floats(1e-3, 100), slopes=st.tuples(NUMBERS, NUMBERS),
)  # fmt: skip
def test_no_other_coefficients_give_a_lower_model(a, b, ridge, slopes):
    """Delta = a and delta_0 = b in R^3, F the identity on the first two axes."""
    model = plane(
        slopes,
        (dot(a, a), dot(a, b), dot(b, b)),
        (dot(a[:2], a[:2]), dot(a[:2], b[:2]), dot(b[:2], b[:2])),
    )
    q00, q01, q11 = model.curvature(ridge)
    if q00 <= 1e-6 or q00 * q11 - q01 * q01 <= 1e-6 * q00 * q11:
        return
    alpha, mu = model.minimum(ridge)
    lowest = model.change(alpha, mu, ridge)
    assert lowest <= 0
    half_slope = 0.5 * (alpha * slopes[0] + mu * slopes[1])
    assert lowest == pytest.approx(half_slope, rel=1e-5, abs=1e-9)
    for step in (-0.1, 0.1):
        slack = 1e-9 * (1 + abs(lowest))
        assert model.change(alpha + step, mu, ridge) >= lowest - slack
        assert model.change(alpha, mu + step, ridge) >= lowest - slack


def dot(u, v):
    return sum(x * y for x, y in zip(u, v, strict=True))


def test_without_a_previous_update_it_is_a_line_search():
    alpha, mu = plane((-6.0, 0.0), (1.0, 0.0, 0.0), (2.0, 0.0, 0.0)).minimum(1.0)
    assert (alpha, mu) == (2.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, -0.5, 1e-3])
def test_a_parallel_previous_update_gives_no_momentum(scale):
    model = plane((-6.0, -6.0 * scale), (1.0, scale, scale**2), (2.0, 2.0 * scale, 2.0 * scale**2))
    assert model.minimum(1.0) == (pytest.approx(2.0), 0.0)


def test_a_zero_gradient_gives_no_step():
    assert plane((0.0, 0.0), (0.0,) * 3, (0.0,) * 3).minimum(1.0) == (0.0, 0.0)


def test_square_norm():
    model = plane((0.0, 0.0), (4.0, 1.0, 9.0), (0.0, 0.0, 0.0))
    assert model.square_norm(0.5, 2.0) == 4.0 / 4 + 2 * 0.5 * 2.0 * 1.0 + 4 * 9.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_plane_with_a_number_that_is_not_finite_is_not_finite(bad):
    assert plane((0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)).is_finite()
    assert not plane((0.0, bad), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)).is_finite()
    assert not plane((0.0, 0.0), (1.0, 1.0, 1.0), (1.0, bad, 1.0)).is_finite()
