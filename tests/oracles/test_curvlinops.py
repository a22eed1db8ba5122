"""Factors and directions compared with curvlinops, an independent implementation.

Its type-2 Fisher is our `exact`. Its losses are torch's with `reduction="sum"`: its squared error
is twice our log-likelihood, and its G is a sum over cases where ours is a mean. So its matrix is
`scale` times ours, and its damping is `scale * gamma^2`.
"""

import pytest
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import nn

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.damped import invert_pair
from tests.oracles.truth.library import mean_tensors

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
NUM_CASES = 5
GAMMA = 0.3
LOSSES = {"gaussian": nn.MSELoss, "categorical": nn.CrossEntropyLoss}


class OverSequence(nn.Module):
    def forward(self, x):
        return x.mean(1)


class OverSpace(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


NETWORKS = {
    "linear": (lambda: [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)], (4,)),
    "sequence": (lambda: [nn.Linear(4, 3), nn.Tanh(), OverSequence(), nn.Linear(3, 3)], (6, 4)),
    "convolution": (
        lambda: [
            nn.Conv2d(2, 3, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2, dilation=2, padding=1),
            nn.ReLU(),
            OverSpace(),
            nn.Linear(4, 3),
        ],
        (2, 6, 5),
    ),
}


def problem(network, distribution):
    torch.manual_seed(0)
    layers, shape = NETWORKS[network]
    model = nn.Sequential(*layers()).double()
    inputs = torch.randn(NUM_CASES, *shape).double()
    if distribution == "gaussian":
        return model, inputs, torch.randn(NUM_CASES, 3).double()
    return model, inputs, torch.randint(3, (NUM_CASES,))


def as_matrix(tensors, name):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return torch.cat([weight.flatten(start_dim=1), bias.unsqueeze(1)], dim=1)


def theirs(model, inputs, targets, distribution, sharing):
    return KFACLinearOperator(
        model,
        LOSSES[distribution](reduction="sum"),
        list(model.parameters()),
        [(inputs, targets)],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("distribution", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_factors_and_directions(network, distribution, sharing):
    model, inputs, targets = problem(network, distribution)
    operator = theirs(model, inputs, targets, distribution, sharing)
    operator.compute_kronecker_factors()
    ours = mean_tensors(distribution, model, inputs, targets, weight_sharing=sharing)
    scale = NUM_CASES * (2 if distribution == "gaussian" else 1)
    inverse = KFACInverseLinearOperator(
        operator, damping=scale * GAMMA**2, use_heuristic_damping=True
    )
    gradients = [torch.randn_like(p) for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    directions = dict(zip(names, inverse @ gradients, strict=True))
    by_name = dict(zip(names, gradients, strict=True))
    for name, factors in ours.items():
        A, G = operator._input_covariances[name], operator._gradient_covariances[name]
        torch.testing.assert_close(factors["A"], A, **CLOSE)
        torch.testing.assert_close(scale * factors["G"], G, **CLOSE)
        inverted = invert_pair(KroneckerPair(**factors), GAMMA).inverse
        direction = inverted.apply(as_matrix(by_name, name))
        torch.testing.assert_close(direction, scale * as_matrix(directions, name), **CLOSE)
