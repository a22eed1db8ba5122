"""Properties of the curvature of every kind of layer, for any statistics and dampings."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.core.factors import KroneckerPair, UnitMoments
from kfac_dist.core.inverse.damped import damping_split, invert_layer, redamp_layer
from tests.oracles.truth.layer_models import MODELS
from tests.oracles.truth.library import mean_tensors

GAMMAS = st.floats(0.01, 10.0)


def dense_matrix(factors):
    """Return the curvature by rows of V, [rows * columns, rows * columns]."""
    if isinstance(factors, UnitMoments):
        return torch.block_diag(*factors.M)
    A = torch.diag(factors.A) if factors.A.dim() == 1 else factors.A
    return torch.kron(factors.G, A)


def dense_damped(factors, gamma):
    if isinstance(factors, UnitMoments):
        matrix = dense_matrix(factors)
        return matrix + gamma**2 * torch.eye(len(matrix), dtype=matrix.dtype)
    pi = damping_split(factors, "trace")
    A = torch.diag(factors.A) if factors.A.dim() == 1 else factors.A
    A = A + pi * gamma * torch.eye(len(A), dtype=A.dtype)
    G = factors.G + gamma / pi * torch.eye(len(factors.G), dtype=A.dtype)
    return torch.kron(G, A)


def shape_of(factors):
    if isinstance(factors, UnitMoments):
        return factors.M.shape[:2]
    return len(factors.G), len(factors.A)


@st.composite
def layers(draw):
    """Factors of one of three kinds, from few samples or many."""
    kind = draw(st.sampled_from(["dense", "diagonal", "units"]))
    samples, rows, columns = (draw(st.integers(1, 5)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def second_moment(*shape):
        rows = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
        return torch.einsum("n...i,n...j->...ij", rows, rows) / samples

    if kind == "units":
        return UnitMoments(M=second_moment(rows, columns))
    A = second_moment(columns)
    return KroneckerPair(A=A.diagonal().clone() if kind == "diagonal" else A, G=second_moment(rows))


@given(factors=layers(), gamma=GAMMAS, more=st.floats(1.0, 5.0))
def test_inverse_times_damped_curvature_is_the_identity(factors, gamma, more):
    matrix = torch.randn(*shape_of(factors), generator=torch.Generator().manual_seed(0)).double()
    inverted = invert_layer(factors, gamma)
    damped = (dense_damped(factors, gamma) @ matrix.flatten()).view_as(matrix)
    torch.testing.assert_close(inverted.inverse.apply(damped), matrix, rtol=1e-6, atol=1e-6)
    heavier = redamp_layer(inverted, gamma * more)
    anew = invert_layer(factors, gamma * more).inverse
    for key, value in heavier.inverse.tensors().items():
        torch.testing.assert_close(value, anew.tensors()[key], rtol=1e-6, atol=1e-6)


@given(factors=layers())
def test_large_damping_tends_to_the_scaled_gradient(factors):
    matrix = torch.ones(*shape_of(factors), dtype=torch.float64)
    gamma = 1e7
    direction = invert_layer(factors, gamma).inverse.apply(matrix) * gamma**2
    torch.testing.assert_close(direction, matrix, rtol=1e-3, atol=0)


@given(
    which=st.sampled_from(sorted(MODELS)),
    fisher_type=st.sampled_from(["mc", "exact", "empirical"]),
    sharing=st.sampled_from(["expand", "reduce"]),
    max_factor_dim=st.sampled_from([None, 3]),
    num_cases=st.integers(1, 6),
)
def test_factors_are_symmetric_and_positive(which, fisher_type, sharing, max_factor_dim, num_cases):
    model, inputs, targets = MODELS[which]()
    options = {"weight_sharing": sharing, "max_factor_dim": max_factor_dim}
    inputs, targets = inputs[:num_cases], targets[:num_cases]
    found = mean_tensors("categorical", model, inputs, targets, fisher_type, **options)
    for tensors in found.values():
        for value in tensors.values():
            if value.dim() == 1:
                assert (value >= 0).all()
                continue
            torch.testing.assert_close(value, value.mT, rtol=1e-12, atol=1e-13)
            lowest = torch.linalg.eigvalsh(value).min()
            assert lowest >= -1e-12 * max(1.0, value.abs().max().item())
