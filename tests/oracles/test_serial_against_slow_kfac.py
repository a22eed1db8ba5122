"""The serial optimizer against K-FAC written out densely, step by step."""

from dataclasses import replace

import pytest
import torch

from kfac_dist import KFAC
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.oracles.truth.slow_kfac import SlowKFAC, SlowOptions
from tests.oracles.truth.slow_structures import SlowChainKFAC, SlowEKFAC

NUM_STEPS = 20
RELATIVE = 1e-7

VARIANTS = {
    "paper": SlowOptions(),
    "fractions": SlowOptions(statistics_fraction=0.3, fisher_fraction=0.45),
    "frobenius": SlowOptions(pi_norm="frobenius", factor_decay=0.6),
    "rho with damping": SlowOptions(rho_includes_damping=True, damping=20.0),
    "small damping": SlowOptions(damping=1e-4, gamma=0.3),
    "gamma follows damping": SlowOptions(gamma_period=None, damping_period=1),
    "no adaptation": SlowOptions(gamma_period=None, damping_period=None),
    "norm constraint": SlowOptions(step_rule="norm_constraint"),
    "norm constraint, no gamma": SlowOptions(step_rule="norm_constraint", gamma_period=None),
    "norm constraint, free": SlowOptions(
        step_rule="norm_constraint", norm_constraint=100.0, lr=0.1, momentum=0.5
    ),
}


def case_for(distribution):
    return Case(
        widths=(5, 4, 3),
        activation="tanh",
        distribution=distribution,
        num_cases=11,
        seed=21,
    )


def optimizer_for(model, distribution, o: SlowOptions, inverse="block_diagonal"):
    rule = {}
    if o.step_rule == "norm_constraint":
        rule = {"lr": o.lr, "momentum": o.momentum, "norm_constraint": o.norm_constraint}
    return KFAC(
        model,
        distribution=distribution,
        step_rule=o.step_rule,
        inverse=inverse,
        fisher_type="exact",
        damping={
            "initial": o.damping,
            "adapt_period": o.damping_period,
            "rho_includes_damping": o.rho_includes_damping,
        },
        gamma={"initial": o.gamma, "adapt_period": o.gamma_period},
        l2=o.l2,
        factor_decay=o.factor_decay,
        inverse_update_period=o.inverse_period,
        statistics_fraction=o.statistics_fraction,
        fisher_fraction=o.fisher_fraction,
        pi_norm=o.pi_norm,
        averaging={"decay": o.averaging_decay, "start": o.averaging_start},
        **rule,
    )


def assert_same_step(result, expected, model, optimizer, rule):
    close = {"rel": RELATIVE, "abs": RELATIVE}
    assert result.loss == pytest.approx(expected.loss, **close)
    assert result.alpha == pytest.approx(expected.alpha, **close)
    assert result.mu == pytest.approx(expected.mu, **close)
    assert result.damping == pytest.approx(expected.damping, **close)
    assert result.gamma == pytest.approx(expected.gamma, **close)
    if rule == "adaptive":
        assert result.predicted_change == pytest.approx(expected.predicted_change, **close)
    if expected.reduction_ratio is None:
        assert result.reduction_ratio is None
    else:
        assert result.reduction_ratio == pytest.approx(expected.reduction_ratio, rel=1e-5)
    vector = dense.parameter_vector(model)
    torch.testing.assert_close(vector, expected.parameters, rtol=RELATIVE, atol=RELATIVE)
    averaged = optimizer.averaged_parameters
    if expected.averaged is None:
        assert averaged is None
    else:
        torch.testing.assert_close(averaged, expected.averaged, rtol=RELATIVE, atol=RELATIVE)


# Each variant runs with one distribution; "paper" and "norm constraint, free" with all of them.
RUNS = [
    (variant, distribution)
    for number, variant in enumerate(VARIANTS)
    for place, distribution in enumerate(DISTRIBUTIONS)
    if variant in ("paper", "norm constraint, free") or place == number % 3
]


@pytest.mark.parametrize(("variant", "distribution"), RUNS)
def test_every_step_is_the_slow_step(variant, distribution):
    options, case = VARIANTS[variant], case_for(distribution)
    optimizer = optimizer_for(model := case.model(), distribution, options)
    slow = SlowKFAC(distribution, case.model(), replace(options))
    assert_same_run(model, optimizer, slow, case.data())


# EKFAC's basis is not unique if a factor has equal eigenvalues. The last G of a Gaussian has them,
# and so have factors from a fraction of these few cases, as zeros.
STRUCTURES = {
    "block_tridiagonal": (SlowChainKFAC, "gaussian"),
    "ekfac": (SlowEKFAC, "bernoulli"),
}
STRUCTURE_RUNS = [
    *(("block_tridiagonal", v) for v in ("paper", "frobenius", "fractions", "norm constraint")),
    *(("ekfac", v) for v in ("paper", "frobenius", "norm constraint")),
]


@pytest.mark.parametrize(("inverse", "variant"), STRUCTURE_RUNS)
def test_every_step_of_the_other_structures_is_the_slow_step(inverse, variant):
    slow_class, distribution = STRUCTURES[inverse]
    options = VARIANTS[variant]
    case = Case(
        widths=(4, 3, 3, 2), activation="tanh", distribution=distribution, num_cases=11, seed=5
    )
    optimizer = optimizer_for(model := case.model(), distribution, options, inverse)
    slow = slow_class(distribution, case.model(), replace(options))
    assert_same_run(model, optimizer, slow, case.data())


def assert_same_run(model, optimizer, slow, data):
    options, (inputs, targets) = slow.o, data
    gammas = set()
    for step in range(NUM_STEPS):
        rows = slice(step % 3, step % 3 + 9)  # the batch changes from step to step
        expected = slow.step(inputs[rows], targets[rows])
        result = optimizer.step(inputs[rows], targets[rows])
        assert_same_step(result, expected, model, optimizer, options.step_rule)
        gammas.add(expected.gamma)
    for name, (A, G) in slow.factors.items():
        torch.testing.assert_close(optimizer.factors[name].A, A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(optimizer.factors[name].G, G, rtol=RELATIVE, atol=1e-9)
    if options.damping_period or options.gamma_period:
        assert len(gammas) > 1
