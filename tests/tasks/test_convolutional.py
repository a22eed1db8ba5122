"""The convolutional networks of the task classifier."""

import math

import pytest
import torch
from torch import nn

from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.tasks.convolutional import (
    PadShortcut,
    ResNet20,
    convolution,
    small_convolutional_network,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def resnet(normalization="group", shortcut="pad", num_channels=3):
    return ResNet20(num_channels, 10, normalization=normalization, shortcut=shortcut)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_weights_have_the_variance_of_he():
    layer = convolution(30, 200, 3, stride=1, bias=True)

    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 270), rel=0.01)
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("normalization", ["none", "batch", "group"])
def test_the_small_network_halves_the_image_at_each_convolution(normalization):
    model = small_convolutional_network(1, (6, 12), 10, nn.ReLU, normalization)
    names = [name for name, _ in model.named_children()]

    norms = ["norm1", "norm2"] if normalization != "none" else []
    assert [name for name in names if name.startswith("norm")] == norms
    assert (model.conv1.bias is None) == bool(norms)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert model[: names.index("mean")](torch.rand(2, 1, 28, 28)).shape == (2, 12, 7, 7)


def test_resnet_20_is_the_papers():
    """0.27 million parameters and 19 convolutions with a fully connected layer (He et al. 2016)."""
    model = resnet("batch")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]

    assert len(convolutions) == 19
    assert num_parameters(model) == 269_722
    assert [block.conv1.stride[0] for block in model.blocks] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_other_shortcut_has_two_projections():
    convolutions = [m for m in resnet(shortcut="conv").modules() if isinstance(m, nn.Conv2d)]

    assert [layer.kernel_size for layer in convolutions].count((1, 1)) == 2
    assert len(convolutions) == 21


def test_the_shortcut_without_parameters_thins_and_pads():
    inputs = torch.rand(2, 3, 5, 6)

    outputs = PadShortcut(3, 2)(inputs)

    assert outputs.shape == (2, 6, 3, 3)
    assert torch.equal(outputs[:, 1:4], inputs[:, :, ::2, ::2])
    assert (outputs[:, [0, 4, 5]] == 0).all()


@pytest.mark.parametrize("normalization", ["none", "batch", "group"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_signals_neither_die_nor_explode_in_resnet_20(normalization, shape):
    model = resnet(normalization, num_channels=shape[0])

    logits = model(torch.randn(16, *shape))

    assert logits.shape == (16, 10)
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("normalization", ["none", "group"])
@pytest.mark.parametrize("network", ["small", "resnet"])
def test_forward_mode_works(network, normalization):
    """u^T F u is the squared norm of the difference quotient of the outputs, through B^T."""
    model = (
        small_convolutional_network(3, (8, 8), 5, nn.Tanh, normalization)
        if network == "small"
        else resnet(normalization)
    ).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    distribution = get_distribution("categorical")
    computer = BatchComputer(model, distribution=distribution, seed=0)
    vectors = torch.randn(2, num_parameters(model), dtype=torch.float64)

    gram = computer.fisher_sums(images, vectors).gram

    step, base = 1e-6, nn.utils.parameters_to_vector(model.parameters()).detach()
    outputs = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(base + sign * step * vectors[1], model.parameters())
        with torch.no_grad():
            outputs.append(model(images))
    nn.utils.vector_to_parameters(base, model.parameters())
    with torch.no_grad():
        quotient = (outputs[0] - outputs[1]) / (2 * step)
        root = distribution.root_transpose_product(model(images), quotient)
    assert gram[1, 1].item() == pytest.approx(root.square().sum().item(), rel=1e-5)
