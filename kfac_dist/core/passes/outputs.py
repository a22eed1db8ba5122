"""Are the outputs of a model one tensor, in a type that losses and their derivatives can have?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.errors import InvalidSpecError

_HALF = (torch.bfloat16, torch.float16)


_ADVICE = "Wrap it in a module that returns only these"


def checked_outputs(outputs: object, model: str, advice: str = _ADVICE) -> Tensor:
    """Return what a model returned, which must be one tensor.

    Raises:
        InvalidSpecError: it did not; the message begins with `model` and ends with `advice`.
    """
    if isinstance(outputs, Tensor):
        return outputs
    what = type(outputs).__name__
    if isinstance(outputs, dict):
        what += f" with the keys {', '.join(map(str, outputs))}"
    elif isinstance(outputs, list | tuple):
        what += f" of {len(outputs)} elements"
    raise InvalidSpecError(
        f"{model} returned a {what}; it must return one tensor, the outputs that parametrise the "
        f"distribution. {advice}"
    )


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a model that takes and returns the cases first.

    Raises:
        InvalidSpecError: they are not one tensor of full precision with one row for each case.
    """
    outputs = full_outputs(model(inputs), model)
    if outputs.shape[:1] != inputs.shape[:1]:
        raise InvalidSpecError(
            f"{type(model).__name__} returned outputs of shape {tuple(outputs.shape)} for "
            f"{len(inputs)} cases; return them as [cases, ...]"
        )
    return outputs


def full_outputs(outputs: object, model: nn.Module) -> Tensor:
    """Return what a pass of K-FAC, for which autocast is off, gave: a tensor of full precision.

    Raises:
        InvalidSpecError: it did not.
    """
    name = type(model).__name__
    outputs = checked_outputs(outputs, name)
    if outputs.dtype in _HALF:
        raise InvalidSpecError(
            f"{name} returned outputs in {outputs.dtype}, although autocast was off; the loss and "
            "its derivatives need float32 or float64. Return outputs.float()"
        )
    return outputs


def full(values: Tensor) -> Tensor:
    """Return values of half precision in float32, and others as they are.

    A model may turn autocast on itself; what its layers saw is averaged in full precision.
    """
    return values.float() if values.dtype in _HALF else values
