"""Convolutional networks of the task `classifier`: a small one, and ResNet-20.

Images are `[N, channels, height, width]`, outputs are class logits `[N, num_classes]`. Weights are
drawn from N(0, 2 / fan_in), as in He et al. (2015) for ReLU; biases are zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_GROUPS = 8  # of a GroupNorm; the first stage of ResNet-20 then has two channels a group

_STAGES = (16, 32, 64)  # channels of ResNet-20 (He et al. 2016, section 4.2)
_BLOCKS_A_STAGE = 3


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(gcd(_MAX_GROUPS, channels), channels)


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()


NORMALIZATIONS: Mapping[str, Callable[[int], nn.Module]] = {
    "none": _no_norm,
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
}
SHORTCUTS = ("pad", "conv")


def convolution(fan_in: int, fan_out: int, kernel: int, *, stride: int, bias: bool) -> nn.Conv2d:
    """Return a square convolution, padded so that only its stride changes the size."""
    layer = nn.Conv2d(
        fan_in, fan_out, kernel, stride=stride, padding=kernel // 2, bias=bias, device="meta"
    ).to_empty(device="cpu")  # made without values: drawing them twice would use up random numbers
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _output(fan_in: int, num_classes: int) -> nn.Linear:
    layer = nn.Linear(fan_in, num_classes, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=fan_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def small_convolutional_network(
    num_channels: int,
    channels: Sequence[int],
    num_classes: int,
    activation: Callable[[], nn.Module],
    normalization: str,
) -> nn.Sequential:
    """Return 3x3 convolutions `conv1`, `conv2`, ... and a linear layer `output`.

    Each convolution is followed by normalisation, activation, and max-pooling that halves the
    image. The output layer receives the mean over the remaining positions.

    Args:
        num_channels: of the images.
        channels: of each convolution.
        num_classes: number of outputs.
        activation: makes an activation module.
        normalization: a name in `NORMALIZATIONS`.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    fan_in = num_channels
    for i, fan_out in enumerate(channels, start=1):
        has_norm = normalization != "none"
        modules[f"conv{i}"] = convolution(fan_in, fan_out, 3, stride=1, bias=not has_norm)
        if has_norm:
            modules[f"norm{i}"] = NORMALIZATIONS[normalization](fan_out)
        modules[f"activation{i}"] = activation()
        modules[f"pool{i}"] = nn.MaxPool2d(2)
        fan_in = fan_out
    modules["mean"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["output"] = _output(fan_in, num_classes)
    return nn.Sequential(modules)


class PadShortcut(nn.Module):
    """The shortcut without parameters ("option A"): fewer pixels, and zeros as new channels."""

    def __init__(self, num_new: int, stride: int) -> None:
        super().__init__()
        self.num_new = num_new
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, C + num_new, H / stride, W / stride]`, sizes rounded up."""
        thinned = inputs[:, :, :: self.stride, :: self.stride]
        before = self.num_new // 2
        return F.pad(thinned, (0, 0, 0, 0, before, self.num_new - before))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(
        self, fan_in: int, fan_out: int, *, stride: int, normalization: str, shortcut: str
    ) -> None:
        super().__init__()
        norm, bias = NORMALIZATIONS[normalization], normalization == "none"
        self.conv1 = convolution(fan_in, fan_out, 3, stride=stride, bias=bias)
        self.norm1 = norm(fan_out)
        self.conv2 = convolution(fan_out, fan_out, 3, stride=1, bias=bias)
        self.norm2 = norm(fan_out)
        if stride == 1 and fan_in == fan_out:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(fan_out - fan_in, stride)
        else:
            self.shortcut = nn.Sequential(
                convolution(fan_in, fan_out, 1, stride=stride, bias=bias), norm(fan_out)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[N, fan_in, H, W]` to `[N, fan_out, H / stride, W / stride]`, sizes rounded up."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


class ResNet20(nn.Module):
    """The 20-layer residual network for small images of He et al. (2016), section 4.2.

    Without normalisation, the weights of the last convolution in each branch are divided by the
    square root of the number of branches. Otherwise each of the nine branches would double the
    variance of the signal.
    """

    def __init__(
        self, num_channels: int, num_classes: int, *, normalization: str, shortcut: str
    ) -> None:
        super().__init__()
        bias = normalization == "none"
        self.conv = convolution(num_channels, _STAGES[0], 3, stride=1, bias=bias)
        self.norm = NORMALIZATIONS[normalization](_STAGES[0])
        sizes = [(_STAGES[0], _STAGES[0]), *pairwise(_STAGES)]
        blocks = [
            ResidualBlock(
                fan_in if i == 0 else fan_out,
                fan_out,
                stride=2 if i == 0 and fan_in != fan_out else 1,
                normalization=normalization,
                shortcut=shortcut,
            )
            for fan_in, fan_out in sizes
            for i in range(_BLOCKS_A_STAGE)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.output = _output(_STAGES[-1], num_classes)
        if normalization == "none":
            with torch.no_grad():
                for block in blocks:
                    block.conv2.weight.mul_(len(blocks) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[N, channels, H, W]` to logits `[N, num_classes]`."""
        hidden = self.blocks(F.relu(self.norm(self.conv(images))))
        logits: Tensor = self.output(hidden.mean(dim=(2, 3)))
        return logits
