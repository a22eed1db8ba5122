"""Properties that hold for any factors, dampings and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_dist import KFAC
from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import FactorAverages, KroneckerPair
from kfac_dist.core.inverse.damped import invert_pair, redamp
from kfac_dist.core.inverse.precondition import matrices_of, precondition_layers, vector_of
from tests.core.inverse.layers_of_a_chain import STRUCTURES
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.oracles.truth.library import computer_for

EPSILON = torch.finfo(torch.float64).eps
SIZES = st.integers(1, 8)
SEEDS = st.integers(0, 2**31)


def log_uniform(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def gram(generator, rank, size, scale):
    rows = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return scale * rows.T @ rows


@st.composite
def pairs(draw):
    generator = torch.Generator().manual_seed(draw(SEEDS))
    factors = [
        gram(generator, draw(st.integers(0, 9)), draw(SIZES), draw(log_uniform(-6, 6)))
        for _ in range(2)
    ]
    return KroneckerPair(A=factors[0], G=factors[1])


def gradient_for(pair, seed=0):
    return torch.randn(
        len(pair.G),
        len(pair.A),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


@given(pair=pairs(), gamma=log_uniform(-6, 4), norm=st.sampled_from(["trace", "frobenius"]))
def test_inverse_errs_no_more_than_the_condition_number_allows(pair, gamma, norm):
    inverted = invert_pair(pair, gamma, norm)
    for factor, inverse, damping in (
        (pair.A, inverted.inverse.A, inverted.pi * gamma),
        (pair.G, inverted.inverse.G, gamma / inverted.pi),
    ):
        eye = torch.eye(len(factor), dtype=torch.float64)
        damped = factor + damping * eye
        error = torch.linalg.matrix_norm(inverse @ damped - eye, ord=2).item()
        condition = torch.linalg.cond(damped).item()
        assert error <= 50 * len(factor) * EPSILON * condition


@given(pair=pairs(), gamma=log_uniform(-4, 3), seed=SEEDS)
def test_direction_descends(pair, gamma, seed):
    V = gradient_for(pair, seed)
    U = invert_pair(pair, gamma).inverse.apply(V)
    assert (U * V).sum() > 0


@given(pair=pairs(), seed=SEEDS)
def test_large_damping_gives_the_scaled_gradient(pair, seed):
    V = gradient_for(pair, seed)
    pi = invert_pair(pair, 1.0).pi
    largest = max(
        torch.linalg.matrix_norm(pair.A, ord=2).item() / pi,
        torch.linalg.matrix_norm(pair.G, ord=2).item() * pi,
        1.0,
    )
    gamma = 1e6 * largest
    U = invert_pair(pair, gamma).inverse.apply(V)
    torch.testing.assert_close(U * gamma**2, V, rtol=1e-5, atol=1e-5)


@given(pair=pairs(), gamma=log_uniform(-3, 2), factor=st.floats(1.0, 100.0), seed=SEEDS)
def test_more_damping_gives_a_shorter_direction(pair, gamma, factor, seed):
    V = gradient_for(pair, seed)
    short = redamp(invert_pair(pair, gamma), gamma * factor).inverse.apply(V)
    long = invert_pair(pair, gamma).inverse.apply(V)
    assert short.norm() <= long.norm() * (1 + 1e-6)


@settings(max_examples=40)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    fisher_type=st.sampled_from(["mc", "exact", "empirical"]),
    num_cases=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    decay=st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_averaged_factors_are_symmetric_and_positive_semidefinite(
    distribution, fisher_type, num_cases, decay, seed
):
    model = Case(widths=(3, 4, 3), activation="tanh", distribution=distribution, seed=seed).model()
    computer = computer_for(distribution, model, fisher_type, seed)
    averages = FactorAverages(register(model, kfac_settings({})).names, decay)
    for step, count in enumerate(num_cases, start=1):
        case = Case(
            widths=(3, 3),
            activation="linear",
            distribution=distribution,
            num_cases=count,
            seed=seed + step,
        )
        averages.update(step, computer.statistics(*case.data(), step=step).factors, count)
    for name in averages.names:
        pair = averages.pair(name)
        for factor in (pair.A, pair.G):
            assert torch.equal(factor, factor.T)
            eigenvalues = torch.linalg.eigvalsh(factor)
            assert eigenvalues.min() >= -1e-13 * max(eigenvalues.max().item(), 1.0)


@given(seed=SEEDS, gamma=log_uniform(-3, 1), scale=log_uniform(-3, 3))
def test_direction_is_linear_in_the_gradient(seed, gamma, scale):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    registration = register(model, kfac_settings({}))
    generator = torch.Generator().manual_seed(seed)
    inverses = {
        block.name: invert_pair(
            KroneckerPair(
                A=gram(generator, 6, block.dim_A, 1.0), G=gram(generator, 6, block.dim_G, 1.0)
            ),
            gamma,
        ).inverse
        for block in registration.blocks
    }
    gradient = torch.randn(registration.num_parameters, generator=generator, dtype=torch.float64)

    def direction(vector):
        matrices = matrices_of(vector, registration.blocks)
        solved, fallen = precondition_layers(matrices, inverses, gamma)
        assert fallen == ()
        return vector_of(solved, registration.blocks, vector)

    plain, scaled = direction(gradient), direction(scale * gradient)
    assert (scaled - scale * plain).norm() <= 1e-10 * scale * plain.norm()


@st.composite
def kfac_options(draw):
    """Draw options that the state must carry: structures, rules, schedules and periods."""
    period = st.none() | st.integers(1, 4)
    adapt_period = draw(period)
    falling = {"schedule": "exponential", "initial": 3.0, "final": 0.5, "steps": 6}
    cosine = {"schedule": "cosine", "initial": 0.3, "final": 0.0, "steps": 5, "warmup_steps": 2}
    return {
        "inverse": draw(st.sampled_from(STRUCTURES)),
        "fisher_type": draw(st.sampled_from(["mc", "exact", "empirical"])),
        "step_rule": draw(st.sampled_from(["adaptive", "norm_constraint"])),
        "damping": {
            "initial": draw(st.just(2.0) if adapt_period else st.sampled_from([2.0, falling])),
            "adapt_period": adapt_period,
        },
        "gamma": {"adapt_period": draw(period)},
        "lr": draw(st.sampled_from([0.2, cosine])),
        "factor_update_period": draw(st.integers(1, 3)),
        "inverse_update_period": draw(st.integers(1, 4)),
        "averaging": draw(st.sampled_from([None, {"decay": 0.9, "start": 3}])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=40)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    options=kfac_options(),
    saved_after=st.integers(0, 6),
)
def test_a_saved_state_gives_the_same_next_steps(distribution, options, saved_after):
    case = Case(widths=(3, 4, 3), activation="tanh", distribution=distribution, num_cases=8)
    inputs, targets = case.data()
    model, other_model = case.model(), case.model()
    optimizer = KFAC(model, distribution=distribution, **options)
    for _ in range(saved_after):
        optimizer.step(inputs, targets)
    other_model.load_state_dict(model.state_dict())
    other = KFAC(other_model, distribution=distribution, **options)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        assert other.step(inputs, targets) == optimizer.step(inputs, targets)
    for mine, its in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(mine, its)
