"""Oracle 12 for layers of every kind: the sums over parts of a batch add up."""

import pytest
import torch

from tests.oracles.truth.layer_models import MODELS, NUM_CASES
from tests.oracles.truth.library import computer_for

SPLITS = [(3, 3), (1, 0, 5)]


def assert_close(actual, expected):
    # Some are zero up to rounding, because softmax does not depend on the bias of the keys.
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * scale + 1e-25)


@pytest.mark.parametrize(
    "options", [{}, {"weight_sharing": "reduce", "max_factor_dim": 3}], ids=str
)
@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_statistics(which, split, fisher_type, options):
    model, inputs, targets = MODELS[which]()
    computer = computer_for("categorical", model, fisher_type, **options)
    whole = computer.statistics(inputs, targets, step=4).factors
    parts, start = [], 0
    for size in split:
        at = slice(start, start + size)
        parts.append(computer.statistics(inputs[at], targets[at], step=4, first_row=start).factors)
        start += size
    assert start == NUM_CASES
    for name, factors in whole.items():
        for key, value in factors.tensors().items():
            assert_close(sum(part[name].tensors()[key] for part in parts), value)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_gradient_and_fisher_products(which, split):
    model, inputs, targets = MODELS[which]()
    computer = computer_for("categorical", model)
    whole = computer.gradient(inputs, targets)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, len(whole.gradient), generator=generator, dtype=torch.float64)
    gradients, grams, start = [], [], 0
    for size in split:
        at = slice(start, start + size)
        gradients.append(computer.gradient(inputs[at], targets[at]).gradient)
        grams.append(computer.fisher_sums(inputs[at], vectors).gram)
        start += size
    assert_close(sum(gradients), whole.gradient)
    assert_close(sum(grams), computer.fisher_sums(inputs, vectors).gram)
