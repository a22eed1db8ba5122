"""Tied, reused, frozen and split layers against the dense Fisher, where exactness is expected."""

import pytest
import torch
from torch import nn

from tests.oracles.truth import dense, dense_layers
from tests.oracles.truth.cases import Case
from tests.oracles.truth.layer_models import MODELS
from tests.oracles.truth.library import mean_tensors

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class TwoReadings(nn.Module):
    """Two layers with the same input, or one used twice: for one case, *reduce* is exact."""

    def __init__(self, how):
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = self.left if how == "reused" else nn.Linear(3, 3)
        self.right.weight = self.left.weight
        if how == "tied":
            self.right.bias = self.left.bias
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.left(x)) * torch.sin(self.right(x)))


def one_case(how):
    torch.manual_seed(1)
    return TwoReadings(how).double(), torch.randn(1, 3).double(), torch.randn(1, 2).double()


def assert_exact(factors, truth, at):
    actual = dense.kronecker_block(factors["A"], factors["G"], "rows")
    torch.testing.assert_close(actual, dense_layers.block_at(truth, at), **CLOSE)


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("how", ["reused", "tied"])
def test_a_weight_that_is_used_twice_is_one_block(how, fisher_type):
    model, inputs, targets = one_case(how)
    factors = mean_tensors("gaussian", model, inputs, targets, fisher_type, weight_sharing="reduce")
    assert list(factors) == ["left", "out"]
    truth = (
        dense.fisher("gaussian", model, inputs)
        if fisher_type == "exact"
        else dense.empirical_fisher("gaussian", model, inputs, targets)
    )
    assert_exact(
        factors["left"], truth, dense_layers.matrix_places(model, "left.weight", "left.bias")
    )


def test_a_tied_weight_has_two_biases_of_their_own():
    model, inputs, targets = one_case("tied weight alone")
    factors = mean_tensors("gaussian", model, inputs, targets, weight_sharing="reduce")
    truth = dense.fisher("gaussian", model, inputs)
    assert list(factors) == ["left", "left.bias", "right.bias", "out"]
    assert_exact(factors["left"], truth, dense_layers.matrix_places(model, "left.weight", None))
    for name in ("left.bias", "right.bias"):
        assert_exact(factors[name], truth, dense_layers.matrix_places(model, None, name))


def test_a_bias_on_a_frozen_weight_is_exact_for_any_number_of_cases():
    case = Case(widths=(4, 3, 2), activation="tanh", distribution="categorical", num_cases=6)
    model, (inputs, targets) = case.model(), case.data()
    model[0].weight.requires_grad_(False)
    factors = mean_tensors("categorical", model, inputs, targets)
    truth = dense.fisher("categorical", model, inputs)
    torch.testing.assert_close(factors["0.bias"]["A"], torch.ones(1, 1).double())
    assert_exact(factors["0.bias"], truth, dense_layers.matrix_places(model, None, "0.bias"))


def ranges(name):
    return [
        slice(*map(int, part.split(":"))) for part in name.partition("[")[2].rstrip("]").split(",")
    ]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("options", [{"max_factor_dim": 3}, {"fused_outputs": {"qkv": 4}}], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_splits_have_the_sub_blocks_of_the_whole_factors(which, options, sharing):
    model, inputs, targets = MODELS[which]()
    common = {"weight_sharing": sharing}
    whole = mean_tensors("categorical", model, inputs, targets, **common, fused_outputs={})
    split = mean_tensors("categorical", model, inputs, targets, **common, **options)
    num_split = 0
    for name, factors in split.items():
        if "[" not in name:
            continue
        num_split += 1
        rows, columns = ranges(name)
        layer = whole[name.partition("[")[0]]
        A = layer["A"][columns, columns] if layer["A"].dim() == 2 else layer["A"]
        torch.testing.assert_close(factors["A"], A, **CLOSE)
        torch.testing.assert_close(factors["G"], layer["G"][rows, rows], **CLOSE)
    assert num_split > 3 or (which == "scaled" and "fused_outputs" in options)
