"""Oracle 3: weights that are shared along a sequence.

With a loss at each position, *expand* is exact for deep linear nets. If the outputs are summed or
averaged over the sequence, *reduce* is exact (mean of inputs, sum of output derivatives).
"""

import pytest
import torch
from torch import nn

from tests.oracles.truth import dense
from tests.oracles.truth.cases import Case, layer_names
from tests.oracles.truth.library import mean_tensors

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class OverSequence(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return getattr(torch, self.how)(x, dim=1)


def linear_net(bias=True):
    return Case(
        widths=(4, 3, 3, 2),
        activation="linear",
        distribution="gaussian",
        bias=bias,
        num_cases=6,
        shared=(5,),
    )


def errors(model, inputs, targets, sharing):
    truth = dense.fisher("gaussian", model, inputs)
    factors = mean_tensors("gaussian", model, inputs, targets, weight_sharing=sharing)
    return {
        name: (
            dense.kronecker_block(f["A"], f["G"], order),
            dense.layer_block(truth, model, name, order),
        )
        for name, f in factors.items()
        for order in ("rows",)
    }


@pytest.mark.parametrize("bias", [True, False])
def test_expand_is_exact_with_a_loss_at_each_position(bias):
    case = linear_net(bias)
    model, (inputs, targets) = case.model(), case.data()
    found = errors(model, inputs, targets, "expand")
    assert list(found) == layer_names(model)
    for actual, expected in found.values():
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("bias", [True, False])
def test_reduce_is_exact_with_outputs_over_the_sequence(bias, how):
    case = linear_net(bias)
    inputs, targets = case.data()
    model = nn.Sequential(*case.model(), OverSequence(how))
    for actual, expected in errors(model, inputs, targets[:, 0], "reduce").values():
        torch.testing.assert_close(actual, expected, **CLOSE)
    wrong = [
        (actual - expected).norm() / expected.norm()
        for actual, expected in errors(model, inputs, targets[:, 0], "expand").values()
    ]
    assert max(wrong) > 0.1


def test_without_shared_positions_both_are_the_same():
    case = Case(widths=(4, 3, 2), activation="tanh", distribution="categorical", num_cases=5)
    model, (inputs, targets) = case.model(), case.data()
    expand = mean_tensors("categorical", model, inputs, targets, weight_sharing="expand")
    reduce = mean_tensors("categorical", model, inputs, targets, weight_sharing="reduce")
    for name, factors in expand.items():
        for key, value in factors.items():
            torch.testing.assert_close(reduce[name][key], value, **CLOSE)
