"""Oracle 12, serial part: the sums over the parts of a batch add up to those of the whole batch.

The parts are equal, uneven or empty. The sums are loss, gradient, Fisher products, and statistics
of the three Fisher types, whose sampled targets depend on the place of a case and not on its part.
"""

import pytest
import torch

from kfac_dist.core.passes.noise import keyed_noise
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.oracles.truth.library import computer_for

TOLERANCE = 1e-12
NUM_CASES = 150
SPLITS = [(75, 75), (64, 86), (37, 51, 62), (7, 0, 143)]
CASES = tuple(
    Case(
        widths=(4, 3, 3),
        activation="tanh",
        distribution=distribution,
        num_cases=NUM_CASES,
        seed=11,
    )
    for distribution in DISTRIBUTIONS
)


def slices(split):
    start = 0
    for size in split:
        yield slice(start, start + size)
        start += size


def assert_close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.distribution)
def test_loss_and_gradient(case, split):
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(case.distribution, model)
    parts = [computer.gradient(inputs[at], targets[at]) for at in slices(split)]
    whole = computer.gradient(inputs, targets)
    assert_close(sum(part.gradient for part in parts), whole.gradient)
    assert_close(sum(part.loss for part in parts), whole.loss)
    assert_close(sum(computer.loss(inputs[at], targets[at]) for at in slices(split)), whole.loss)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.distribution)
def test_whole_is_the_sum_of_the_cases(case):
    model, (inputs, targets) = case.model(), case.data()
    whole = computer_for(case.distribution, model).gradient(inputs, targets)
    truth = dense.per_case_gradients(case.distribution, model, inputs, targets)
    assert_close(whole.gradient, truth.sum(dim=0))
    assert_close(whole.loss, dense.batch_loss(case.distribution, model, inputs, targets).detach())


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.distribution)
def test_statistics(case, split, fisher_type):
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(case.distribution, model, fisher_type)
    whole = computer.statistics(inputs, targets, step=4).factors
    parts = [
        computer.statistics(inputs[at], targets[at], step=4, first_row=at.start).factors
        for at in slices(split)
    ]
    for name, pair in whole.items():
        assert_close(sum(part[name].A for part in parts), pair.A)
        assert_close(sum(part[name].G for part in parts), pair.G)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.distribution)
def test_fisher_products(case, split):
    model, (inputs, _) = case.model(), case.data()
    computer = computer_for(case.distribution, model)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, dense.num_parameters(model), generator=generator, dtype=torch.float64)
    whole = computer.fisher_sums(inputs, vectors).gram
    assert_close(sum(computer.fisher_sums(inputs[at], vectors).gram for at in slices(split)), whole)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_sampled_noise_of_a_row_is_bitwise_that_of_the_whole(split, kind):
    like = torch.zeros((), dtype=torch.float64)
    arguments = {"seed": 5, "step": 9, "shape": (3, 2), "like": like}
    whole = keyed_noise(kind, rows=range(NUM_CASES), **arguments)
    parts = [keyed_noise(kind, rows=range(at.start, at.stop), **arguments) for at in slices(split)]
    assert torch.equal(torch.cat(parts), whole)
