import math

import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.precondition import matrices_of, precondition_layers, vector_of

GAMMA = 0.5


@pytest.fixture
def blocks():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False)).double()
    return register(model, kfac_settings({})).blocks


@pytest.fixture
def gradient():
    return torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)


def inverses_of(blocks, value=0.5):
    return {
        block.name: KroneckerPair(
            A=value * torch.eye(block.dim_A, dtype=torch.float64),
            G=torch.eye(block.dim_G, dtype=torch.float64),
        )
        for block in blocks
    }


def direction(gradient, blocks, inverses):
    solved, fallen = precondition_layers(matrices_of(gradient, blocks), inverses, GAMMA)
    return vector_of(solved, blocks, gradient), fallen


def test_precondition_is_the_two_sided_product():
    V = torch.arange(6.0).reshape(2, 3)
    A, G = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    directions, fallen = precondition_layers(
        {"layer": V}, {"layer": KroneckerPair(A=A, G=G)}, GAMMA
    )
    assert fallen == ()
    assert torch.equal(directions["layer"], G @ V @ A)


def test_direction_covers_every_layer(blocks, gradient):
    result, fallen = direction(gradient, blocks, inverses_of(blocks))
    assert fallen == ()
    torch.testing.assert_close(result, 0.5 * gradient)


def test_a_layer_without_inverse_falls_back_to_the_gradient(blocks, gradient):
    inverses = inverses_of(blocks)
    del inverses["0"]
    result, fallen = direction(gradient, blocks, inverses)
    assert fallen == ("0",)
    torch.testing.assert_close(result[:8], gradient[:8] / GAMMA**2)
    torch.testing.assert_close(result[8:], 0.5 * gradient[8:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_bad_inverse_falls_back_to_the_gradient(blocks, gradient, value):
    inverses = inverses_of(blocks)
    inverses["1"] = KroneckerPair(
        A=value * torch.eye(2, dtype=torch.float64), G=torch.eye(2, dtype=torch.float64)
    )
    result, fallen = direction(gradient, blocks, inverses)
    assert fallen == ("1",)
    torch.testing.assert_close(result[8:], gradient[8:] / GAMMA**2)


def test_a_zero_gradient_is_no_fallback(blocks):
    zero = torch.zeros(12, dtype=torch.float64)
    result, fallen = direction(zero, blocks, inverses_of(blocks))
    assert fallen == ()
    assert torch.equal(result, zero)
