"""The axis of the cases in what a user gives."""

from __future__ import annotations

from torch import Tensor

from kfac_dist.errors import InvalidSpecError


def checked_case_axis(axis: object) -> int:
    """Return `axis` if it is a whole number from 0; raise InvalidSpecError otherwise."""
    if isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0:
        return axis
    raise InvalidSpecError(f"case_axis: {axis!r} is not a whole number from 0")


def cases_of(inputs: object, axis: int, owner: str) -> Tensor:
    """Return a user's inputs, which have the cases along `axis`, as [N, ...].

    Raises:
        InvalidSpecError: they are not one tensor, or have no such axis.
    """
    if not isinstance(inputs, Tensor):
        raise InvalidSpecError(
            f"{owner}: the inputs are {type(inputs).__name__}, not one tensor with an axis of "
            "cases. Wrap the model in a module that takes one tensor and passes on its parts"
        )
    if inputs.dim() <= axis:
        raise InvalidSpecError(
            f"{owner}: the inputs have shape {tuple(inputs.shape)}, so they have no axis {axis} of "
            "cases"
        )
    return inputs.movedim(axis, 0)
