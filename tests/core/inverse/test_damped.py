import math

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair, UnitMoments
from kfac_dist.core.inverse.damped import (
    InversionFailedError,
    damping_split,
    invert_layer,
    invert_pair,
    redamp,
)


def pair_of(A, G, dtype=torch.float64):
    return KroneckerPair(A=torch.as_tensor(A, dtype=dtype), G=torch.as_tensor(G, dtype=dtype))


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_pi_by_the_trace_norm():
    pair = pair_of(diagonal(4.0, 12.0), diagonal(1.0, 2.0, 3.0))
    assert damping_split(pair, "trace") == pytest.approx(math.sqrt(8.0 / 2.0))


def test_pi_by_the_frobenius_norm():
    pair = pair_of(diagonal(3.0, 4.0), [[2.0]])
    assert damping_split(pair, "frobenius") == pytest.approx(math.sqrt(5 / math.sqrt(2) / 2))


@pytest.mark.parametrize("norm", ["trace", "frobenius"])
@pytest.mark.parametrize(
    ("A", "G"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], ids=["A zero", "G zero", "both zero"]
)
def test_zero_factors_split_evenly_and_invert(A, G, norm):
    pair = pair_of(A * torch.eye(3), G * torch.eye(2))
    assert damping_split(pair, norm) == 1.0
    inverted = invert_pair(pair, 0.5, norm)
    assert inverted.rungs == ()
    torch.testing.assert_close(inverted.inverse.A, torch.eye(3, dtype=torch.float64) / (A + 0.5))
    torch.testing.assert_close(inverted.inverse.G, torch.eye(2, dtype=torch.float64) / (G + 0.5))


@pytest.mark.parametrize("norm", ["trace", "frobenius"])
def test_pi_of_tiny_factors_is_bounded(norm):
    tiny, eye = 1e-300 * torch.eye(2), torch.eye(2)
    for pair in (pair_of(tiny, eye), pair_of(eye, tiny), pair_of(tiny, tiny)):
        assert 1e-6 <= damping_split(pair, norm) <= 1e6
        inverse = invert_pair(pair, 0.1, norm).inverse
        assert inverse.is_finite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "G"])
def test_a_factor_that_is_not_finite_is_refused(factor, bad):
    pair = pair_of(torch.eye(3), torch.eye(2))
    getattr(pair, factor)[1, 1] = bad
    with pytest.raises(InversionFailedError, match="not finite"):
        invert_pair(pair, 0.1)


def test_an_indefinite_factor_gets_more_damping():
    pair = pair_of(diagonal(5.0, -1.0), torch.eye(2))
    inverted = invert_pair(pair, 0.05)
    assert "raised_damping" in inverted.rungs
    assert inverted.inverse.is_finite()
    assert torch.linalg.eigvalsh(inverted.inverse.A).min() > 0
    torch.testing.assert_close(  # the other factor keeps its own damping
        inverted.inverse.G,
        torch.eye(2, dtype=torch.float64) / (1 + 0.05 / inverted.pi),
    )


def test_a_factor_that_no_damping_helps_is_given_up():
    with pytest.raises(InversionFailedError, match="order 2"):
        invert_pair(pair_of(diagonal(1e9, -1e9), torch.eye(2)), 1e-6)


def test_a_factor_on_the_edge_of_float32_is_inverted_in_float64():
    pair = KroneckerPair(A=torch.ones(4, 4), G=torch.eye(2))
    gamma = 1e-8  # lost beside 1 in float32
    inverted = invert_pair(pair, gamma)
    assert inverted.rungs == ("float64",)
    assert inverted.inverse.A.dtype == torch.float32
    wide = torch.ones(4, 4, dtype=torch.float64)
    wide.diagonal().add_(gamma * inverted.pi)
    torch.testing.assert_close(
        inverted.inverse.A.double(), torch.linalg.inv(wide), rtol=1e-5, atol=0
    )


def test_inverses_are_exactly_symmetric():
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    inverse = invert_pair(KroneckerPair(A=rows.T @ rows, G=torch.eye(2)), 0.01).inverse
    assert torch.equal(inverse.A, inverse.A.T)


def test_the_factors_are_not_changed():
    pair = pair_of(diagonal(1.0, 2.0), torch.eye(2))
    invert_pair(pair, 0.5)
    assert torch.equal(pair.A, diagonal(1.0, 2.0))


def test_redamping_downwards_is_refused():
    inverted = invert_pair(pair_of(torch.eye(2), torch.eye(2)), 0.5)
    with pytest.raises(ValueError, match="raised"):
        redamp(inverted, 0.4)


def test_one_bad_unit_does_not_stop_the_others_from_being_tried():
    good, bad = torch.eye(2, dtype=torch.float64), diagonal(1.0, -1e-3)
    inverted = invert_layer(UnitMoments(M=torch.stack([good, bad])), 1e-2)
    assert inverted.rungs[0] == "float64"
    assert torch.linalg.eigvalsh(inverted.inverse.M).min() > 0


def test_a_root_with_zeros_on_its_diagonal_climbs_instead_of_raising():
    pair = pair_of(torch.ones(3, 3), torch.eye(2))
    inverted = invert_pair(pair, 1e-17)
    assert inverted.rungs[:1] == ("float64",)
    assert "raised_damping" in inverted.rungs


def test_a_finite_inverse_whose_sum_overflows_needs_no_rung():
    pair = KroneckerPair(A=torch.eye(200) * 1e-37, G=torch.ones(1, 1) * 1e-37)
    inverted = invert_pair(pair, 1e-38)
    assert torch.isinf(inverted.inverse.A.sum())
    assert inverted.rungs == ()
