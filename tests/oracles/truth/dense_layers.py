"""Dense truth for layers of every kind: slow and obvious, written apart from the library."""

import torch
from torch import Tensor, nn

from tests.oracles.truth import dense


def places(model: nn.Module) -> dict[str, Tensor]:
    """Return the places in the vector of each trainable parameter's elements, shaped like it."""
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return found


def matrix_places(model: nn.Module, weight: str | None, bias: str | None) -> Tensor:
    """Return the places of [W, b] as a matrix [outputs, features + 1]."""
    at, columns = places(model), []
    if weight is not None:
        columns.append(at[weight].flatten(start_dim=1))
    if bias is not None:
        columns.append(at[bias].unsqueeze(1))
    return torch.cat(columns, dim=1)


def block_at(matrix: Tensor, at: Tensor) -> Tensor:
    """Return the block of `matrix` [P, P] at some places, in the order of their rows."""
    flat = at.flatten()
    return matrix[flat][:, flat]


def unit_blocks(matrix: Tensor, at: Tensor) -> Tensor:
    """Return the blocks of the units whose parameters are the rows of `at`, [units, k, k]."""
    return torch.stack([matrix[row][:, row] for row in at])


def patches(conv: nn.Module, case: Tensor, group: int) -> Tensor:
    """Return what the kernel sees, [positions, features], by kernels that pick one input each."""
    width = conv.in_channels // conv.groups
    channels = case[:, group * width : (group + 1) * width]
    kernel = conv.weight.shape[2:]
    size = width * kernel.numel()
    picking = torch.eye(size, dtype=case.dtype).view(size, width, *kernel)
    groups, conv.groups = conv.groups, 1
    seen = conv._conv_forward(channels, picking, None)
    conv.groups = groups
    return seen.flatten(2)[0].T


def conv_input_factor(model: nn.Sequential, inputs: Tensor, group: int, sharing: str) -> Tensor:
    """Return A of one group of the first layer, a convolution with a bias."""
    total = 0.0
    for n in range(len(inputs)):
        rows = patches(model[0], inputs[n : n + 1], group)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
        if sharing == "expand":
            total = total + sum(torch.outer(row, row) for row in rows) / len(rows)
        else:
            total = total + torch.outer(rows.mean(dim=0), rows.mean(dim=0))
    return total / len(inputs)


def conv_output_factor(
    name: str, model: nn.Sequential, inputs: Tensor, group: int, sharing: str
) -> Tensor:
    """Return the exact-type G of one group of the first layer, a convolution."""
    conv, behind = model[0], model[1:]
    width = conv.out_channels // conv.groups
    total = 0.0
    for n in range(len(inputs)):
        activity = conv(inputs[n : n + 1]).detach()
        H = dense.output_fisher(name, behind(activity)[0].detach())
        jacobian = torch.func.jacrev(lambda a: behind(a).flatten())(activity)
        jacobian = jacobian.reshape(len(jacobian), conv.out_channels, -1)
        jacobian = jacobian[:, group * width : (group + 1) * width]
        if sharing == "reduce":
            jacobian = jacobian.sum(dim=2, keepdim=True)
        for position in range(jacobian.shape[2]):
            J = jacobian[:, :, position]
            total = total + J.T @ H @ J
    return total / len(inputs)
