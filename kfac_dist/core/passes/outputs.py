"""Are the outputs of a model one tensor, in a type that losses and their derivatives can have?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.errors import InvalidSpecError

_HALF = (torch.bfloat16, torch.float16)


def check_outputs(outputs: object, model: str) -> None:
    """Check that a model returned one tensor.

    Raises:
        InvalidSpecError: it did not; the message begins with `model`.
    """
    if isinstance(outputs, Tensor):
        return
    what = type(outputs).__name__
    if isinstance(outputs, dict):
        what += f" with the keys {', '.join(map(str, outputs))}"
    elif isinstance(outputs, list | tuple):
        what += f" of {len(outputs)} elements"
    raise InvalidSpecError(
        f"{model} returned a {what}; it must return one tensor, the outputs that parametrise the "
        "distribution. Wrap it in a module that returns only these"
    )


def check_full_outputs(outputs: object, model: nn.Module) -> None:
    """Check that a pass of K-FAC, for which autocast is off, gave one tensor in full precision.

    Raises:
        InvalidSpecError: it did not.
    """
    name = type(model).__name__
    check_outputs(outputs, name)
    if isinstance(outputs, Tensor) and outputs.dtype in _HALF:
        raise InvalidSpecError(
            f"{name} returned outputs in {outputs.dtype}, although autocast was off; the loss and "
            "its derivatives need float32 or float64. Return outputs.float()"
        )


def full(values: Tensor) -> Tensor:
    """Return values of half precision in float32, and others as they are.

    A model may turn autocast on itself; what its layers saw is averaged in full precision.
    """
    return values.float() if values.dtype in _HALF else values
