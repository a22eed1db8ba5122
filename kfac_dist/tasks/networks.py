"""Fully connected networks of the built-in tasks, and their two initialisations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}

_SPARSE_FAN_IN = 15  # incoming weights that are not zero, for each unit (Martens 2010)


def truncated_normal(weight: Tensor) -> None:
    """Fill `[fan_out, fan_in]` from N(0, 1/fan_in), truncated at two standard deviations.

    As in Haiku and kfac-jax, 1/sqrt(fan_in) is the standard deviation *before* truncation. That of
    the weights is 0.88 times as large.
    """
    std = weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def sparse(weight: Tensor) -> None:
    """Fill `[fan_out, fan_in]` from N(0, 1) at 15 random inputs of each unit, zero elsewhere.

    A unit with fewer inputs is connected to all of them (Martens 2010, section 5).
    """
    fan_out, fan_in = weight.shape
    num_kept = min(_SPARSE_FAN_IN, fan_in)
    kept = torch.rand(fan_out, fan_in).topk(num_kept, dim=1).indices
    values = torch.randn(fan_out, num_kept, dtype=weight.dtype)
    with torch.no_grad():
        weight.zero_().scatter_(1, kept, values)


INITIALIZATIONS: Mapping[str, Callable[[Tensor], None]] = {
    "truncated_normal": truncated_normal,
    "sparse": sparse,
}


def feed_forward(
    sizes: Sequence[int],
    names: Sequence[str],
    linear: Sequence[str],
    activation: str,
    initialization: str,
) -> nn.Sequential:
    """Return linear layers between consecutive `sizes`, with zero biases.

    Args:
        sizes: of the input and of each layer.
        names: of the layers.
        linear: names of the layers that no activation follows.
        activation: a name in `ACTIVATIONS`.
        initialization: a name in `INITIALIZATIONS`.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        # Made without values, because torch's own initialisation would use up random numbers.
        layer = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
        INITIALIZATIONS[initialization](layer.weight)
        nn.init.zeros_(layer.bias)
        modules[name] = layer
        if name not in linear:
            modules[f"{name}_{activation}"] = ACTIVATIONS[activation]()
    return nn.Sequential(modules)


def autoencoder_network(
    num_inputs: int, hidden: Sequence[int], activation: str, initialization: str
) -> nn.Sequential:
    """Return an encoder with layers of sizes `hidden`, the code last, and a mirrored decoder.

    The code and the output layer are linear. The layers are named `encoder1`, ..., `code`,
    `decoder1`, ..., `output`.
    """
    depth = len(hidden)
    sizes = [num_inputs, *hidden, *reversed(hidden[:-1]), num_inputs]
    names = [
        *(f"encoder{i}" for i in range(1, depth)),
        "code",
        *(f"decoder{i}" for i in range(1, depth)),
        "output",
    ]
    return feed_forward(sizes, names, ("code", "output"), activation, initialization)


def classifier_network(
    case_shape: Sequence[int],
    hidden: Sequence[int],
    num_classes: int,
    activation: str,
    initialization: str,
) -> nn.Sequential:
    """Return hidden layers `hidden1`, `hidden2`, ... and a linear layer `output` of class logits.

    Inputs are `[N, *case_shape]`; images are flattened first.
    """
    names = [*(f"hidden{i}" for i in range(1, len(hidden) + 1)), "output"]
    sizes = [prod(case_shape), *hidden, num_classes]
    layers = feed_forward(sizes, names, ("output",), activation, initialization)
    if len(case_shape) == 1:
        return layers
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *layers.named_children()]))
