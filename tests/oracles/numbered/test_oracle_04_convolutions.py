"""Oracle 4: a convolution is a linear layer on its patches (KFC).

For the last convolution before a spatial sum, *reduce* is exact.
"""

import pytest
import torch
from torch import nn

from tests.oracles.truth import dense, dense_layers
from tests.oracles.truth.library import mean_tensors

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CONVOLUTIONS = {
    "1d": (nn.Conv1d, (2, 7), {"kernel_size": 3}),
    "1d-strided": (nn.Conv1d, (2, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "1d-reflect": (nn.Conv1d, (2, 6), {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    "2d": (nn.Conv2d, (2, 5, 4), {"kernel_size": (3, 2), "padding": (1, 0)}),
    "2d-same": (nn.Conv2d, (2, 4, 4), {"kernel_size": (2, 3), "padding": "same", "dilation": 2}),
    "2d-valid": (nn.Conv2d, (2, 4, 4), {"kernel_size": 2, "padding": "valid", "stride": (1, 2)}),
    "2d-dilated": (nn.Conv2d, (2, 6, 5), {"kernel_size": 2, "dilation": (2, 3), "padding": 1}),
    "2d-circular": (
        nn.Conv2d,
        (2, 4, 4),
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ),
    "2d-groups": (nn.Conv2d, (4, 4, 3), {"kernel_size": 2, "groups": 2, "padding": 1}),
    "3d": (nn.Conv3d, (2, 3, 4, 3), {"kernel_size": 2, "stride": (1, 2, 1), "padding": (0, 1, 0)}),
    "3d-groups": (nn.Conv3d, (4, 2, 3, 2), {"kernel_size": (1, 2, 1), "groups": 2}),
}


class SpatialSum(nn.Module):
    def forward(self, x):
        return x.flatten(2).sum(2)


def network(kind, shape, options, *, pooled):
    torch.manual_seed(0)
    conv = kind(shape[0], 4, **options)
    if pooled:
        return nn.Sequential(conv, SpatialSum()).double()
    size = conv(torch.zeros(1, *shape)).numel()
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).double()


def data(shape, num_cases):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_cases, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_cases,), generator=generator)


def block_names(conv):
    if conv.groups == 1:
        return ["0"]
    width, columns = conv.out_channels // conv.groups, conv.weight[0].numel() + 1
    return [f"0[{g * width}:{(g + 1) * width},0:{columns}]" for g in range(conv.groups)]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("which", CONVOLUTIONS)
def test_factors_are_those_of_the_patches(which, sharing):
    kind, shape, options = CONVOLUTIONS[which]
    model, (inputs, targets) = network(kind, shape, options, pooled=False), data(shape, 3)
    factors = mean_tensors("categorical", model, inputs, targets, weight_sharing=sharing)
    names = block_names(model[0])
    assert list(factors) == [*names, "3"]
    for group, name in enumerate(names):
        A = dense_layers.conv_input_factor(model, inputs, group, sharing)
        G = dense_layers.conv_output_factor("categorical", model, inputs, group, sharing)
        torch.testing.assert_close(factors[name]["A"], A, **CLOSE)
        torch.testing.assert_close(factors[name]["G"], G, **CLOSE)


@pytest.mark.parametrize("which", CONVOLUTIONS)
def test_reduce_is_exact_before_a_spatial_sum(which):
    kind, shape, options = CONVOLUTIONS[which]
    model, (inputs, targets) = network(kind, shape, options, pooled=True), data(shape, 3)
    truth = dense.fisher("gaussian", model, inputs)
    factors = mean_tensors("gaussian", model, inputs, targets, weight_sharing="reduce")
    at = dense_layers.matrix_places(model, "0.weight", "0.bias")
    names = block_names(model[0])
    for rows, name in zip(at.chunk(len(names)), names, strict=True):
        actual = dense.kronecker_block(factors[name]["A"], factors[name]["G"], "rows")
        torch.testing.assert_close(actual, dense_layers.block_at(truth, rows), **CLOSE)
