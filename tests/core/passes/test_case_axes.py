"""Where the cases lie in the tensors of a model, found in passes of two and three cases."""

import pytest
import torch
from torch import nn

from kfac_dist.core.passes.case_axes import (
    PLAIN,
    CaseAxis,
    NoAxis,
    Order,
    cases_first,
    find_case_axes,
)
from kfac_dist.core.passes.outputs import outputs_of
from kfac_dist.errors import InvalidSpecError

INPUTS = torch.arange(4 * 5 * 3, dtype=torch.float64).reshape(4, 5, 3).sin()


class Layouts(nn.Module):
    """One layer for each order of cases and positions; inputs [N, 5, 3]."""

    def __init__(self):
        super().__init__()
        names = ("plain", "second", "outside", "inside", "without", "pooled")
        for name in names:
            setattr(self, name, nn.Linear(3, 3, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, inputs):
        hidden = self.plain(inputs)
        hidden = self.second(hidden.transpose(0, 1)).transpose(0, 1)
        shape = hidden.shape
        hidden = self.norm(self.outside(hidden.flatten(0, 1))).unflatten(0, shape[:2])
        last = self.inside(hidden.transpose(0, 1).flatten(0, 1))
        hidden = last.unflatten(0, (shape[1], shape[0])).transpose(0, 1)
        hidden = hidden + self.without(torch.ones(5, 3, dtype=torch.float64))
        pairs = hidden[:, :1] + hidden[:, 0]
        return hidden + self.pooled(pairs).mean(1, keepdim=True)


def test_each_order_of_cases_and_positions_is_found():
    model = Layouts()
    names = {module: name for name, module in model.named_children()}
    axes = find_case_axes(model, INPUTS, 0, list(names))
    found = {names[module]: places for module, places in axes.calls.items()}
    assert axes.outputs == PLAIN
    assert found == {
        "plain": (PLAIN,),
        "second": (CaseAxis(1, Order.CASES),),
        "outside": (CaseAxis(0, Order.CASES_OUTSIDE),),
        "inside": (CaseAxis(0, Order.CASES_INSIDE),),
        "without": (NoAxis.WITHOUT_CASES,),
        "pooled": (NoAxis.UNKNOWN,),
        "norm": (CaseAxis(0, Order.CASES_OUTSIDE),),
    }


@pytest.mark.parametrize(
    "inputs", [INPUTS[:1], torch.arange(10).reshape(2, 5)], ids=["one", "whole"]
)
def test_one_case_or_whole_numbers_are_enough(inputs):
    model = nn.Sequential(nn.Flatten(0, 1)) if inputs.dim() == 3 else nn.Flatten(0)
    axes = find_case_axes(model, inputs, 0, [])
    assert axes.outputs == CaseAxis(0, Order.CASES_OUTSIDE)


def test_finding_changes_nothing():
    model = nn.Sequential(nn.Dropout(), Layouts())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    find_case_axes(model, INPUTS, 0, list(model.modules()))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean(0), r"shape \(5, 3\) for 2 cases and \(5, 3\) for 3, so they have no"),
        (lambda x: x.new_zeros(5, len(x) ** 2), "does not tell where the cases are"),
        (
            lambda x: {"logits": x},
            "returned a dict with the keys logits; it must return one tensor",
        ),
        (lambda x: (x, x), "returned a tuple of 2 elements"),
    ],
)
def test_outputs_without_a_place_for_the_cases_are_refused(function, message):
    with pytest.raises(InvalidSpecError, match=message):
        find_case_axes(Returns(function), INPUTS, 0, [])


def test_a_model_of_a_fixed_number_of_cases_tells_nothing():
    graph = torch.ones(4, 4, dtype=torch.float64)
    axes = find_case_axes(Returns(lambda x: (graph @ x.flatten(1)).view_as(x)), INPUTS, 0, [])
    assert axes.outputs == PLAIN
    assert axes.of_call(nn.Identity(), 0) is NoAxis.UNKNOWN
    with pytest.raises(RuntimeError):
        find_case_axes(nn.Linear(7, 2, dtype=torch.float64), INPUTS, 1, [])


def test_a_vector_of_features_is_not_a_batch():
    with pytest.raises(InvalidSpecError, match=r"shape \(5,\) are one case, give inputs.unsqueeze"):
        find_case_axes(nn.Linear(5, 5, dtype=torch.float64), INPUTS[0, :, 0], 0, [])


def test_outputs_have_a_row_for_each_case():
    with pytest.raises(InvalidSpecError, match=r"outputs of shape \(20, 3\) for 4 cases"):
        outputs_of(nn.Flatten(0, 1), INPUTS)


@pytest.mark.parametrize(
    ("input_axis", "function"),
    [
        (1, lambda x: x),
        (1, lambda x: x.transpose(0, 1)),
        (0, lambda x: x.flatten(0, 1)),
        (1, lambda x: x.flatten(0, 1)),
    ],
)
def test_a_model_takes_and_returns_the_cases_first(input_axis, function):
    model = Returns(function)
    axes = find_case_axes(model, INPUTS, input_axis, [])
    with cases_first(model, input_axis, axes.outputs):
        assert torch.equal(model(INPUTS), INPUTS)
    given = INPUTS.movedim(0, input_axis)
    assert torch.equal(model(given), function(given))
