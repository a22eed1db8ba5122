import math

import pytest
import torch
from torch import nn

from kfac_dist.tasks.autoencoder import PAPER_NETS
from kfac_dist.tasks.networks import (
    autoencoder_network,
    classifier_network,
    sparse,
    truncated_normal,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer_sizes(model):
    layers = [module for module in model if isinstance(module, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def test_truncated_normal_has_its_standard_deviation_before_the_cut():
    weight = torch.empty(2000, 400)

    truncated_normal(weight)

    std = 1 / math.sqrt(400)
    assert weight.abs().max() <= 2 * std
    assert weight.abs().max() > 1.99 * std
    # The variance that a unit normal has left between -2 and 2.
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    left = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    assert left == pytest.approx(0.8796, abs=1e-4)
    assert weight.std().item() == pytest.approx(left * std, rel=0.005)


def test_sparse_keeps_fifteen_incoming_weights():
    weight = torch.full((3000, 100), math.nan)

    sparse(weight)

    assert ((weight != 0).sum(dim=1) == 15).all()
    kept = weight[weight != 0]
    assert kept.mean().item() == pytest.approx(0, abs=0.02)
    assert kept.std().item() == pytest.approx(1, rel=0.02)
    per_input = (weight != 0).sum(dim=0)
    assert per_input.min() > 300  # every input is used, about 450 times


def test_sparse_with_few_inputs_connects_them_all():
    weight = torch.empty(50, 6)

    sparse(weight)

    assert (weight != 0).all()


@pytest.mark.parametrize("initialization", ["truncated_normal", "sparse"])
def test_an_autoencoder_mirrors_its_encoder_around_a_linear_code(initialization):
    model = autoencoder_network(20, (16, 8, 3), "tanh", initialization)

    assert list(dict(model.named_children())) == [
        "encoder1", "encoder1_tanh", "encoder2", "encoder2_tanh", "code",
        "decoder1", "decoder1_tanh", "decoder2", "decoder2_tanh", "output",
    ]  # fmt: skip
    assert layer_sizes(model) == [20, 16, 8, 3, 8, 16, 20]
    assert all((layer.bias == 0).all() for layer in model if isinstance(layer, nn.Linear))
    assert model(torch.zeros(2, 20)).shape == (2, 20)


@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        ("mnist", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("curves", [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("faces", [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
    ],
)
def test_the_papers_three_nets(net, sizes):
    paper = PAPER_NETS[net]

    model = autoencoder_network(paper.num_inputs, paper.hidden, "tanh", "truncated_normal")

    assert layer_sizes(model) == sizes
    assert paper.distribution == ("gaussian" if net == "faces" else "bernoulli")


@pytest.mark.parametrize(
    ("activation", "module"), [("sigmoid", nn.Sigmoid), ("tanh", nn.Tanh), ("relu", nn.ReLU)]
)
def test_activations(activation, module):
    model = classifier_network((5,), (4, 3), 2, activation, "truncated_normal")

    assert [type(layer) for layer in model] == [
        nn.Linear, module, nn.Linear, module, nn.Linear
    ]  # fmt: skip
    assert layer_sizes(model) == [5, 4, 3, 2]
