"""What K-FAC must know of each type of layer: one class for each family, one row for each type.

A rule says how the parameters of a layer form the matrix of a curvature block, and what one call
of the layer says about that matrix. Each call is brought to one normal form, *rows*: inputs
[..., features] and derivatives with respect to outputs [..., outputs], whose other axes are cases
and positions, cases first. The homogeneous coordinate is left out. In each row the layer is
`s = W a`. If its units share no parameters, unit u is `s_u = w_u . a_u` instead, and the features
are the a_u one after the other.

To add a type of layer, add its rule (unless one here fits) and its row in `LAYER_RULES`, or in
`FOREIGN_LAYER_RULES` if the class is another library's. Nothing else in this library
asks for the type of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.core.blocks.block import BlockKind

M = TypeVar("M", bound=nn.Module)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
FeatureNorm = nn.LayerNorm | nn.RMSNorm
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class LayerRule(Generic[M]):
    """The rule for layers of one family; the layer itself is an argument of each method.

    Layers that are `is_linear` can be linked in a block-tridiagonal inverse and can have fused
    outputs. A weight that is `transposed` has a column for each output instead of a row.
    """

    is_linear: ClassVar[bool] = False
    transposed: ClassVar[bool] = False

    def why_not(self, layer: M) -> str:
        """Return why the rule does not hold for this layer, "" if it does."""
        return ""

    def block_kind(self, layer: M, *, has_weight: bool) -> BlockKind:
        """Return the kind of the blocks of the weight and the bias, or of the bias alone."""
        return "kronecker"

    def num_outputs(self, parameter: Tensor) -> int:
        """Return the number of rows of the layer's matrix, from its weight or its bias."""
        return parameter.shape[-1 if self.transposed else 0]

    def num_groups(self, layer: M) -> int:
        """Return the number of equal groups of outputs, each of which sees inputs of its own."""
        return 1

    def least_dims(self, layer: M) -> int:
        """Return the least number of dimensions of an input that has an axis of cases."""
        return 2

    def num_leading_axes(self, layer: M, inputs: Tensor) -> int:
        """Return how many of the first axes may be cases or positions, in any order.

        The outputs have the same ones.
        """
        return max(0, inputs.dim() - self.least_dims(layer) + 1)

    def has_case_axis(self, layer: M, inputs: Tensor, num_cases: int) -> bool:
        """Return whether the first axis of an input is the cases, or a multiple of them."""
        return inputs.dim() >= self.least_dims(layer) and inputs.shape[0] % num_cases == 0

    def input_rows(self, layer: M, inputs: Tensor, group: int | None) -> Tensor:
        """Return the inputs of one call [..., features], of one group or, if None, of all."""
        return inputs

    def output_rows(self, layer: M, gradients: Tensor, group: int | None) -> Tensor:
        """Return the derivatives with respect to the outputs of one call, [..., outputs]."""
        return gradients


class LinearRule(LayerRule[nn.Linear]):
    """`s = W a` in the last axis; the axes between it and the cases are positions."""

    is_linear = True


class TransposedLinearRule(LayerRule[nn.Module]):
    """`s = W^T a` in the last axis: Hugging Face's Conv1D, whose weight is [inputs, outputs]."""

    is_linear = True
    transposed = True


class EmbeddingRule(LayerRule[nn.Embedding]):
    """`s = W a` with one-hot a, of which only the index is kept: A is diagonal."""

    transposed = True

    def why_not(self, layer: nn.Embedding) -> str:
        """Exclude embeddings with max_norm, whose forward pass changes the weight."""
        return "" if layer.max_norm is None else "max_norm changes the weight"

    def block_kind(self, layer: nn.Embedding, *, has_weight: bool) -> BlockKind:
        """Return the kind for one-hot inputs, whose second moment is diagonal."""
        return "kronecker, diagonal A"

    def least_dims(self, layer: nn.Embedding) -> int:
        """Return 1, as indices have no axis of features."""
        return 1

    def input_rows(self, layer: nn.Embedding, inputs: Tensor, group: int | None) -> Tensor:
        """Return the indices [...], -1 at the padding index, which has no gradient."""
        if layer.padding_idx is None:
            return inputs
        return inputs.masked_fill(inputs == layer.padding_idx, -1)


class ConvolutionRule(LayerRule[Conv]):
    """`s = W a` at each position, a what the kernel sees there (KFC, arXiv:1602.01407).

    A depthwise convolution has one kernel for each output, which no other output shares.
    """

    def block_kind(self, layer: Conv, *, has_weight: bool) -> BlockKind:
        """Return the kind; a depthwise convolution is unit-wise, but its biases alone are not."""
        depthwise = layer.groups == layer.out_channels > 1
        return "unit-wise" if has_weight and depthwise else "kronecker"

    def num_groups(self, layer: Conv) -> int:
        """Return the number of groups of channels."""
        return layer.groups

    def least_dims(self, layer: Conv) -> int:
        """Return the cases, the channels and the axes of the kernel: as many as the weight's."""
        return layer.weight.dim()

    def input_rows(self, layer: Conv, inputs: Tensor, group: int | None) -> Tensor:
        """Return the patches, by channels and then by the kernel."""
        width = layer.in_channels // (1 if group is None else layer.groups)
        return patches(layer, inputs, (group or 0) * width, width)

    def output_rows(self, layer: Conv, gradients: Tensor, group: int | None) -> Tensor:
        """Return the channels at each position."""
        channels = _with_cases(layer, gradients).flatten(2).mT
        if group is None:
            return channels
        width = layer.out_channels // layer.groups
        return channels.flatten(0, 1)[:, group * width : (group + 1) * width]


def _with_cases(layer: Conv, values: Tensor) -> Tensor:
    return values if values.dim() == layer.weight.dim() else values.unsqueeze(0)


def patches(layer: Conv, inputs: Tensor, first_channel: int, num_channels: int) -> Tensor:
    """Return what the kernel sees of some channels, [cases, positions, channels * kernel]."""
    kernel = layer.weight.shape[2:]
    batched = _with_cases(layer, inputs)
    channels = batched[:, first_channel : first_channel + num_channels]
    # torch keeps the padding as F.pad takes it: the last axis first, both of its ends.
    padding = list(layer._reversed_padding_repeated_twice)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(channels, padding, mode=mode) if any(padding) else channels
    for axis, size in enumerate(kernel):
        dilation = layer.dilation[axis]
        span = (size - 1) * dilation + 1
        windows = windows.unfold(2 + axis, span, layer.stride[axis])[..., ::dilation]
    # [cases, channels, *positions, *kernel], and the channels go behind the positions.
    last = 2 + len(kernel)
    order = [0, *range(2, last), 1, *range(last, last + len(kernel))]
    return windows.permute(order).reshape(len(batched), -1, num_channels * kernel.numel())


class FeatureNormRule(LayerRule[FeatureNorm]):
    """`s_u = scale_u xhat_u + shift_u` for each feature u: the last axes of the input.

    `normalise(layer, inputs)` returns xhat, shaped like the inputs.
    """

    def __init__(self, normalise: Callable[[Any, Tensor], Tensor]) -> None:
        self._normalise = normalise

    def block_kind(self, layer: FeatureNorm, *, has_weight: bool) -> BlockKind:
        """Return the kind; each feature is a unit."""
        return "unit-wise"

    def num_outputs(self, parameter: Tensor) -> int:
        """Return the number of features, which may lie along several axes."""
        return parameter.numel()

    def least_dims(self, layer: FeatureNorm) -> int:
        """Return the number of axes of the features, and 1 for the cases."""
        return len(layer.normalized_shape) + 1

    def input_rows(self, layer: FeatureNorm, inputs: Tensor, group: int | None) -> Tensor:
        """Return xhat, its features along one axis."""
        return self.output_rows(layer, self._normalise(layer, inputs), group)

    def output_rows(self, layer: FeatureNorm, gradients: Tensor, group: int | None) -> Tensor:
        """Return the derivatives, the features along one axis."""
        return gradients.flatten(-len(layer.normalized_shape))


class ChannelNormRule(LayerRule[nn.Module]):
    """`s_u = scale_u xhat_u + shift_u` for each channel u: the second axis of the input.

    `normalise(layer, inputs)` returns xhat, shaped like the inputs.
    """

    def __init__(self, normalise: Callable[[Any, Tensor], Tensor]) -> None:
        self._normalise = normalise

    def block_kind(self, layer: nn.Module, *, has_weight: bool) -> BlockKind:
        """Return the kind; each channel is a unit."""
        return "unit-wise"

    def num_leading_axes(self, layer: nn.Module, inputs: Tensor) -> int:
        """Return 1, as the channels come next."""
        return 1

    def input_rows(self, layer: nn.Module, inputs: Tensor, group: int | None) -> Tensor:
        """Return the channels of xhat at each position."""
        return self.output_rows(layer, self._normalise(layer, inputs), group)

    def output_rows(self, layer: nn.Module, gradients: Tensor, group: int | None) -> Tensor:
        """Return the channels of the derivatives at each position."""
        return gradients.reshape(*gradients.shape[:2], -1).mT


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor) -> Tensor:
    return F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)


def _rms_norm(layer: nn.RMSNorm, inputs: Tensor) -> Tensor:
    return F.rms_norm(inputs, list(layer.normalized_shape), eps=layer.eps)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor) -> Tensor:
    return F.group_norm(inputs, layer.num_groups, eps=layer.eps)


def _batch_norm(layer: BatchNorm, inputs: Tensor) -> Tensor:
    batch = layer.training or layer.running_mean is None
    mean, var = (None, None) if batch else (layer.running_mean, layer.running_var)
    return F.batch_norm(inputs, mean, var, training=batch, eps=layer.eps)


LAYER_RULES: dict[type[nn.Module], LayerRule[Any]] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.Conv1d: ConvolutionRule(),
    nn.Conv2d: ConvolutionRule(),
    nn.Conv3d: ConvolutionRule(),
    nn.LayerNorm: FeatureNormRule(_layer_norm),
    nn.RMSNorm: FeatureNormRule(_rms_norm),
    nn.GroupNorm: ChannelNormRule(_group_norm),
    nn.BatchNorm1d: ChannelNormRule(_batch_norm),
    nn.BatchNorm2d: ChannelNormRule(_batch_norm),
    nn.BatchNorm3d: ChannelNormRule(_batch_norm),
}

# Layers of libraries that this one does not import, by the full name of the class.
FOREIGN_LAYER_RULES: dict[str, LayerRule[Any]] = {
    "transformers.pytorch_utils.Conv1D": TransposedLinearRule(),
}


def rule_for(module: nn.Module) -> LayerRule[Any] | None:
    """Return the rule in the table for a module, None if its type is not there.

    A subclass has the rule of its base only if it computes the same.
    """
    for kind, rule in LAYER_RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    for base in type(module).__mro__:
        foreign = FOREIGN_LAYER_RULES.get(f"{base.__module__}.{base.__qualname__}")
        if foreign is not None and type(module).forward is base.__dict__.get("forward"):
            return foreign
    return None


def bypasses_parts(module: nn.Module) -> bool:
    """Return whether a module uses the weights of its parts without calling the parts."""
    return isinstance(module, nn.MultiheadAttention)
