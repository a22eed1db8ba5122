"""Parameter-shaped quantities as one flat vector.

A vector of length P runs over the trainable parameters in the order of
`model.named_parameters()`, each flattened by rows. Gradients, directions and updates have this
form everywhere. The process group sends it as it is, and a dot product is a single call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to train by name, each once, in the order of the vector."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flatten(tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Concatenate `tensors` into a vector [P]: a new one, or `out`, which is overwritten.

    Reusing `out` is worthwhile: new memory costs more, page by page, than copying to it.
    """
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors], out=out)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of `vector` [P] with the shapes of `like`, in order, without a copy."""
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def add_to_parameters(parameters: Sequence[Tensor], update: Tensor) -> None:
    """Add the vector `update` [P] to the parameters in place."""
    with torch.no_grad():
        for parameter, piece in zip(parameters, unflatten(update, parameters), strict=True):
            parameter.add_(piece)


def assign_parameters(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Overwrite the parameters in place with the vector `values` [P]."""
    with torch.no_grad():
        for parameter, piece in zip(parameters, unflatten(values, parameters), strict=True):
            parameter.copy_(piece)


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    A finite sum has finite terms, and it takes a twentieth of the time of testing each of them.
    They are tested only if the sum is not finite, because finite numbers can overflow in it.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element of any tensor is NaN or infinite.

    The tensors are on one device. If all are finite, they are judged in one transfer to the host.
    """
    tensors = list(tensors)
    if not tensors:
        return True
    finite = torch.stack([torch.isfinite(tensor.sum()) for tensor in tensors])
    return bool(finite.all()) or all(map(is_finite, tensors))


def rows_at(values: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the rows of `values` [n, ...] at `positions`, or `values` itself if that is all.

    n positions are always taken to be all rows in order.
    """
    if len(positions) == len(values):
        return values
    # From pinned memory the copy to a GPU does not hold up the caller.
    index = torch.tensor(positions, dtype=torch.int64, pin_memory=values.is_cuda)
    return values[index.to(values.device, non_blocking=True)]
