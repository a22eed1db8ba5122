"""Statistics of the calls of a training loop, summed over its micro-batches and processes.

K-FAC's own passes repeat a call of the training loop on some of its cases. They are asked for by
number, so a pass has one tensor of inputs, however many arguments the call has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.inverse.curvature import Curvature
from kfac_dist.core.passes.outputs import full_outputs
from kfac_dist.core.passes.running_statistics import batch_norms
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.core.vector import unflatten
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.model_calls import ModelCall


class RepeatedCalls(nn.Module):
    """A model as a function of the numbers of cases [n], int64, in one call of it.

    Its parameters, buffers and modules are those of the model, under the same names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = model  # not a child, which would change the names
        self.__dict__["call"] = None
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of the model, itself among them."""
        yield from self.__dict__["inner"].named_modules(*args, **kwargs)

    def parts(self, call: ModelCall) -> list[ModelCall]:
        """Return the parts of a call, as `ModelCall.parts` does.

        Raises:
            InvalidSpecError: there are several parts, and batch normalisation couples the cases.
        """
        parts = list(call.parts())
        if len(parts) > 1 and batch_norms(self):
            raise InvalidSpecError(
                f"KFACPreconditioner: {call.model} has batch normalisation, and its cases have "
                f"{len(parts)} different lengths without their padding, so statistics of the whole "
                "batch cannot be repeated; give all cases of a batch one length"
            )
        return parts

    @contextmanager
    def repeating(self, call: ModelCall) -> Iterator[Tensor]:
        """Give the numbers of all cases of a call; passes inside repeat this call.

        They are [N, 1, ...], with as many axes as the first tensor of the call.
        """
        self.__dict__["call"] = call
        like = next(tensor for tensor in call.tensors() if tensor.dim())
        try:
            with _without_autocast(self.__dict__["inner"]):
                numbers = torch.arange(call.num_cases, device=like.device)
                yield numbers.reshape(-1, *[1] * (like.dim() - 1))
        finally:
            self.__dict__["call"] = None

    def forward(self, cases: Tensor) -> Tensor:
        """Return the outputs for the cases with these numbers, as the model returns them.

        Raises:
            InvalidSpecError: the model returns something else than one tensor for these cases.
        """
        call: ModelCall = self.__dict__["call"].take(cases.flatten())
        args, kwargs = call.to_pass()
        inner = self.__dict__["inner"]
        outputs = full_outputs(call.reader.outputs_of(call.model, inner(*args, **kwargs)), inner)
        counted = None if call.reader.counted is None else call.reader.counted(call.named())
        if counted is None:
            return outputs
        if counted.shape != outputs.shape[: counted.dim()]:
            raise InvalidSpecError(
                f"KFACPreconditioner: counted returns {list(counted.shape)} for outputs "
                f"{list(outputs.shape)} of {call.model}; it must be shaped like their first axes"
            )
        # Constants have no derivatives, whatever target is sampled for them.
        places = counted.reshape(counted.shape + (1,) * (outputs.dim() - counted.dim()))
        return torch.where(places, outputs, torch.zeros_like(outputs))


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Undo what Accelerate does to a model under mixed precision: its forward pass in autocast."""
    original = model.__dict__.get("_original_forward")
    wrapped = model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield
        return
    model.__dict__["forward"] = original
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the rank of this process in a group, and the number of its processes."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def statistics_of_calls(
    computer: BatchComputer,
    curvature: Curvature,
    calls: Sequence[ModelCall],
    *,
    step: int,
    place: tuple[int, int],
) -> tuple[BatchStatistics, int]:
    """Return the sums over the micro-batches of this process, and their number of cases.

    A process without cases takes part with sums that are zero, so that no other waits for it. The
    model of `computer` is a `RepeatedCalls`.
    """
    repeated = computer.model
    assert isinstance(repeated, RepeatedCalls)
    rank, num_processes = place
    links, bases = curvature.structure.links, curvature.shelf.bases()
    total: BatchStatistics | None = None
    first_row, num_cases = 0, 0
    for call in calls:
        row = first_row + rank * call.num_cases
        for part in repeated.parts(call):
            with repeated.repeating(part) as cases:
                sums = computer.statistics(
                    cases, None, step=step, first_row=row, links=links, bases=bases
                )
            if total is None:
                total = sums
            else:
                total.add_(sums)
            row += part.num_cases
        first_row += num_processes * call.num_cases
        num_cases += call.num_cases
    if total is None:
        nothing = torch.zeros(0, dtype=torch.int64)
        total = computer.statistics(nothing, None, step=step, links=links, bases=bases)
    return total, num_cases


def reduce_statistics(
    statistics: BatchStatistics, num_cases: int, group: dist.ProcessGroup | None
) -> int:
    """Sum over the processes, in place; return the number of cases of all processes."""
    if group is None:
        return num_cases
    tensors = list(statistics.tensors())
    count = tensors[0].new_tensor([num_cases])
    flat = torch.cat([tensor.reshape(-1) for tensor in (*tensors, count)])
    dist.all_reduce(flat, group=group)
    for tensor, piece in zip(tensors, unflatten(flat[:-1], tensors), strict=True):
        tensor.copy_(piece)
    return int(flat[-1])
