"""Unit-wise blocks and diagonals are exactly those of the dense Fisher, for any number of cases."""

import pytest
import torch
from torch import nn

from tests.oracles.truth import dense, dense_layers
from tests.oracles.truth.layer_models import MODELS, randomised
from tests.oracles.truth.library import mean_tensors

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
UNITS = {
    "scaled": ["norm", "groups", "depthwise"],
    "attention": ["norm", "rms"],
}
DIAGONALS = {
    "scaled": ["scale", "up.weight", "up.bias"],
    "attention": [
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    ],
}


def truth_of(fisher_type, model, inputs, targets):
    if fisher_type == "exact":
        return dense.fisher("categorical", model, inputs)
    return dense.empirical_fisher("categorical", model, inputs, targets)


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("which", MODELS)
def test_blocks_of_units_and_diagonals_are_the_dense_ones(which, fisher_type):
    model, inputs, targets = MODELS[which]()
    truth = truth_of(fisher_type, model, inputs, targets)
    factors = mean_tensors("categorical", model, inputs, targets, fisher_type)
    for name in UNITS[which]:
        has_bias = getattr(model.get_submodule(name), "bias", None) is not None
        at = dense_layers.places(model)[f"{name}.weight"]
        at = at.reshape(len(at), -1)
        if has_bias:
            at = torch.cat([at, dense_layers.places(model)[f"{name}.bias"].unsqueeze(1)], dim=1)
        expected = dense_layers.unit_blocks(truth, at)
        torch.testing.assert_close(factors[name]["M"], expected, **CLOSE)
    for name in DIAGONALS[which]:
        expected = truth.diagonal()[dense_layers.places(model)[name].flatten()]
        torch.testing.assert_close(factors[name]["M"].flatten(), expected, **CLOSE)


@pytest.mark.parametrize("which", MODELS)
def test_any_module_or_parameter_may_be_diagonal(which):
    model, inputs, targets = MODELS[which]()
    truth = dense.fisher("categorical", model, inputs)
    factors = mean_tensors("categorical", model, inputs, targets, diagonal=["*"])
    for name, at in dense_layers.places(model).items():
        expected = truth.diagonal()[at.flatten()]
        torch.testing.assert_close(factors[name]["M"].flatten(), expected, **CLOSE)


class Branching(nn.Module):
    """Control flow on values, which vmap does not support."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.inner(x)
        return h * self.scale if h.sum().item() > 0 else h * self.scale**2


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(3, 2, batch_first=True)
        self.out = nn.Linear(2, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0].sum(1))


@pytest.mark.parametrize(
    ("kind", "shape", "names"),
    [(Branching, (3,), ["scale"]), (Recurrent, (4, 3), ["cell.weight_hh_l0", "cell.bias_ih_l0"])],
)
def test_cases_are_done_one_by_one_where_they_must_be(kind, shape, names):
    model = randomised(kind())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1 if kind is Branching else 5, *shape, generator=generator).double()
    targets = torch.randint(3, (len(inputs),), generator=generator)
    truth = dense.empirical_fisher("categorical", model, inputs, targets)
    factors = mean_tensors("categorical", model, inputs, targets, "empirical")
    for name in names:
        expected = truth.diagonal()[dense_layers.places(model)[name].flatten()]
        torch.testing.assert_close(factors[name]["M"].flatten(), expected, **CLOSE)


def test_one_token_a_case_is_exact_in_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    inputs, targets = torch.tensor([[4], [1], [4]]), torch.zeros(3, 2, dtype=torch.float64)
    truth = dense.fisher("gaussian", model, inputs)
    factors = mean_tensors("gaussian", model, inputs, targets)["0"]
    at = dense_layers.places(model)["0.weight"].T
    A = torch.diag(factors["A"])
    actual = dense.kronecker_block(A, factors["G"], "rows")
    torch.testing.assert_close(actual, dense_layers.block_at(truth, at), **CLOSE)
