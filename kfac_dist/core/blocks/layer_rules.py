"""Normal forms: what a call of a module says about its weights, as matrices of rows.

Every layer with Kronecker factors is brought to `s = W a` at `cases * positions` rows, cases
first: inputs [rows, features] and derivatives with respect to outputs [rows, outputs], without
the homogeneous coordinate. A convolution's rows are its patches (KFC, arXiv:1602.01407).

Normalisations are brought to `xhat * scale + shift`: xhat and the derivatives as [cases,
positions, units].
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS)
_KINDS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_NORMS)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose rule holds for `module`; None if there is none.

    A subclass counts as what it is derived from only if it computes the same.
    """
    for kind in _KINDS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def is_norm(module: nn.Module) -> TypeGuard[Norm]:
    """Tell whether a module is a normalisation with scale and shift."""
    return isinstance(module, _NORMS)


def is_convolution(module: nn.Module) -> TypeGuard[Conv]:
    """Tell whether a module is a convolution."""
    return isinstance(module, _CONVOLUTIONS)


def has_case_axis(module: nn.Module, inputs: Tensor, num_cases: int) -> bool:
    """Tell whether the first axis of a module's input is the cases, or a multiple of them."""
    if isinstance(module, nn.Embedding):
        least = 1
    elif isinstance(module, _CONVOLUTIONS):
        least = module.weight.dim()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        least = len(module.normalized_shape) + 1
    else:
        least = 2
    return inputs.dim() >= least and inputs.shape[0] % num_cases == 0


def input_rows(module: nn.Module, inputs: Tensor, group: int | None) -> Tensor:
    """Return the inputs of one call [rows, features], of one group of a convolution or of all."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, module.in_features)
    assert isinstance(module, _CONVOLUTIONS)
    width = module.in_channels // (1 if group is None else module.groups)
    rows = patches(module, inputs, (group or 0) * width, width)
    return rows.reshape(-1, rows.shape[-1])


def output_rows(module: nn.Module, gradients: Tensor, group: int | None) -> Tensor:
    """Return the derivatives with respect to the outputs of one call, [rows, outputs]."""
    if not isinstance(module, _CONVOLUTIONS):
        return gradients.reshape(-1, gradients.shape[-1])
    channels = channels_last(module, gradients).flatten(0, 1)
    if group is None:
        return channels
    width = module.out_channels // module.groups
    return channels[:, group * width : (group + 1) * width]


def channels_last(module: Conv, values: Tensor) -> Tensor:
    """Return outputs [cases, channels, ...] of a convolution as [cases, positions, channels]."""
    batched = values if values.dim() == module.weight.dim() else values.unsqueeze(0)
    return batched.flatten(2).mT


def patches(module: Conv, inputs: Tensor, first_channel: int, num_channels: int) -> Tensor:
    """Return what the kernel of a convolution sees, [cases, positions, channels * kernel]."""
    kernel = module.weight.shape[2:]
    batched = inputs if inputs.dim() == module.weight.dim() else inputs.unsqueeze(0)
    channels = batched[:, first_channel : first_channel + num_channels]
    padding = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(channels, padding, mode=mode) if any(padding) else channels
    for axis, size in enumerate(kernel):
        dilation = module.dilation[axis]
        span = (size - 1) * dilation + 1
        windows = windows.unfold(2 + axis, span, module.stride[axis])[..., ::dilation]
    last = 2 + len(kernel)
    order = [0, *range(2, last), 1, *range(last, last + len(kernel))]
    rows = windows.permute(order)
    return rows.reshape(len(batched), -1, num_channels * kernel.numel())


def normalised(module: Norm, inputs: Tensor) -> Tensor:
    """Return xhat, the input of scale and shift, shaped like the input."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, eps=module.eps)
    assert isinstance(module, _BatchNorm)
    batch = module.training or module.running_mean is None
    mean, var = (None, None) if batch else (module.running_mean, module.running_var)
    return F.batch_norm(inputs, mean, var, training=batch, eps=module.eps)


def by_unit(module: Norm, values: Tensor) -> Tensor:
    """Return inputs or outputs of a normalisation as [first axis, positions, units]."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        units = torch.Size(module.normalized_shape).numel()
        if values.dim() == len(module.normalized_shape):
            return values.reshape(1, 1, units)
        return values.reshape(len(values), -1, units)
    return values.reshape(*values.shape[:2], -1).mT
