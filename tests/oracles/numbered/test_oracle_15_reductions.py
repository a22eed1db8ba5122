"""Oracle 15: factors are the same for mean and sum reductions, repeated batches, flat outputs."""

import pytest
import torch
from torch import nn

from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, NONLINEAR_BATCH, Case, layer_names
from tests.oracles.truth.library import mean_factors

TOLERANCE = 1e-12
FOUR_DIMENSIONAL = tuple(
    Case(
        widths=(3, 4, 2),
        activation="tanh",
        distribution=distribution,
        num_cases=3,
        shared=(2, 3),
        seed=5,
    )
    for distribution in DISTRIBUTIONS
)


def assert_factors_equal(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        for mine, other in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)


def torch_loss(distribution, outputs, targets, reduction):
    """Return the loss of a batch under torch's own reduction (a mean over cases, or a sum)."""
    if distribution == "categorical":
        return nn.functional.cross_entropy(outputs, targets, reduction=reduction)
    if distribution == "bernoulli":
        loss = nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)
    else:
        loss = 0.5 * nn.functional.mse_loss(outputs, targets, reduction=reduction)
    return loss * outputs.shape[-1] if reduction == "mean" else loss


def hooked_factors(case, model, inputs, targets, reduction):
    """Return empirical factors as a library that trains with a reduced loss captures them."""
    captured = {}
    for name in layer_names(model):
        layer = model.get_submodule(name)
        layer.register_forward_hook(
            lambda _module, args, output, name=name: captured.update({name: (args[0], output)})
        )
    loss = torch_loss(case.distribution, model(inputs), targets, reduction)
    factors = {}
    for name in layer_names(model):
        layer_inputs, outputs = captured[name]
        (g,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        if reduction == "mean":
            g = g * len(inputs)
        abar = torch.cat([layer_inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
        factors[name] = (
            (abar.T @ abar / len(inputs)).detach(),
            (g.T @ g / len(inputs)).detach(),
        )
    return factors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", NONLINEAR_BATCH, ids=lambda case: case.id)
def test_factors_do_not_carry_the_reduction_of_the_loss(case, reduction):
    inputs, targets = case.data()
    actual = mean_factors(case.distribution, case.model(), inputs, targets, "empirical")
    assert_factors_equal(actual, hooked_factors(case, case.model(), inputs, targets, reduction))


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("case", NONLINEAR_BATCH, ids=lambda case: case.id)
def test_a_repeated_batch_has_the_same_factors(case, fisher_type):
    model, (inputs, targets) = case.model(), case.data()
    once = mean_factors(case.distribution, model, inputs, targets, fisher_type)
    many = mean_factors(
        case.distribution, model, torch.cat([inputs] * 4), torch.cat([targets] * 4), fisher_type
    )
    assert_factors_equal(many, once)


@pytest.mark.parametrize("fisher_type", ["exact", "empirical", "mc"])
@pytest.mark.parametrize("case", FOUR_DIMENSIONAL, ids=lambda case: case.id)
def test_four_dimensional_outputs_flattened_per_case(case, fisher_type):
    """Outputs [N, 2, 3, C] and [N, 6, C] are the same model, and even sampled targets agree."""
    model, (inputs, targets) = case.model(), case.data()
    flat_inputs, flat_targets = inputs.flatten(1, 2), targets.flatten(1, 2)
    assert_factors_equal(
        mean_factors(case.distribution, model, inputs, targets, fisher_type),
        mean_factors(case.distribution, model, flat_inputs, flat_targets, fisher_type),
    )


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("case", FOUR_DIMENSIONAL, ids=lambda case: case.id)
def test_positions_as_cases(case, fisher_type):
    """If each position is a case of its own, A is the same and G is the mean over positions."""
    model, (inputs, targets) = case.model(), case.data()
    positions = inputs[0, ..., 0].numel()
    whole = mean_factors(case.distribution, model, inputs, targets, fisher_type)
    flat = mean_factors(
        case.distribution, model, inputs.flatten(0, 2), targets.flatten(0, 2), fisher_type
    )
    assert_factors_equal({name: (A, positions * G) for name, (A, G) in flat.items()}, whole)


@pytest.mark.parametrize("case", FOUR_DIMENSIONAL, ids=lambda case: case.id)
def test_four_dimensional_outputs_against_the_dense_factors(case):
    model, (inputs, targets) = case.model(), case.data()
    exact = {}
    empirical = {}
    for name in layer_names(model):
        A = dense.input_factor(model, name, inputs)
        exact[name] = (A, dense.exact_output_factor(case.distribution, model, name, inputs))
        empirical[name] = (
            A,
            dense.empirical_output_factor(case.distribution, model, name, inputs, targets),
        )
    assert_factors_equal(mean_factors(case.distribution, model, inputs, targets, "exact"), exact)
    assert_factors_equal(
        mean_factors(case.distribution, model, inputs, targets, "empirical"), empirical
    )
