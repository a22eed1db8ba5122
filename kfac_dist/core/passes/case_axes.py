"""Which axis of each tensor in a model has the cases: passes of 2 and of 3 cases show it.

An axis whose length is 2 in one pass and 3 in the other has the cases. If it is 2k and 3k, each
case has k positions there, and a third pass, in which one of two cases is another one, shows their
order: all of a case together, as after `x.flatten(0, 1)` of [N, T, ...], or all of a position, as
of [T, N, ...].
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.capture import Captures, capturing
from kfac_dist.core.passes.outputs import full_outputs
from kfac_dist.core.passes.own_passes import own_passes
from kfac_dist.core.passes.running_statistics import (
    batch_norms,
    batch_statistics_fixed,
    running_statistics_kept,
)
from kfac_dist.errors import InvalidSpecError, KfacDistError

_LOG = logging.getLogger(__name__)


class Order(Enum):
    """What an axis of cases has beside the cases."""

    CASES = "cases alone"
    CASES_OUTSIDE = "cases, and inside each its positions"
    CASES_INSIDE = "positions, and inside each the cases"


@dataclass(frozen=True)
class CaseAxis:
    """The place of the cases in a tensor."""

    axis: int
    order: Order

    @property
    def splits(self) -> bool:
        """Whether `split` makes a second axis, of positions."""
        return self.order is not Order.CASES

    @property
    def is_first(self) -> bool:
        """Whether the rows along axis 0 are the cases, or the positions of one after another."""
        return self.axis == 0 and self.order is not Order.CASES_INSIDE

    def fits(self, values: Tensor, num_cases: int) -> bool:
        """Return whether the cases of `values` can lie here."""
        if values.dim() <= self.axis:
            return False
        size = values.shape[self.axis]
        return size == num_cases or (self.order is not Order.CASES and size % num_cases == 0)

    def rows(self, values: Tensor, num_cases: int) -> Tensor:
        """Return `values` as [cases * positions, ...], the positions of a case together."""
        if self.is_first:
            return values
        parts = self.split(values, num_cases)
        return parts if self.order is Order.CASES else parts.flatten(0, 1)

    def split(self, values: Tensor, num_cases: int) -> Tensor:
        """Return `values` as [cases, ...], or as [cases, positions, ...]."""
        front = values.movedim(self.axis, 0)
        if self.order is Order.CASES:
            return front
        if self.order is Order.CASES_OUTSIDE:
            return front.reshape(num_cases, -1, *front.shape[1:])
        return front.reshape(-1, num_cases, *front.shape[1:]).transpose(0, 1)


class NoAxis(Enum):
    """Why there is no place of the cases."""

    WITHOUT_CASES = "the number of cases changes nothing"
    UNKNOWN = "the passes do not tell"


Place = CaseAxis | NoAxis

PLAIN = CaseAxis(0, Order.CASES)


@dataclass(frozen=True)
class CaseAxes:
    """The places of the cases: in the outputs of a model, and in the input of each call."""

    outputs: CaseAxis
    num_output_dims: int
    calls: Mapping[nn.Module, tuple[Place, ...]]

    def of_call(self, module: nn.Module, number: int) -> Place:
        """Return the place in call `number` of a module."""
        places = self.calls.get(module, ())
        if len(set(places)) == 1:
            return places[0]
        return places[number] if number < len(places) else NoAxis.UNKNOWN


@contextmanager
def cases_first(model: nn.Module, input_axis: int, outputs: CaseAxis) -> Iterator[None]:
    """Let `model` take inputs and return outputs with the cases along axis 0.

    Without this, it takes them along `input_axis` and returns them as in `outputs`.
    """
    if input_axis == 0 and outputs == PLAIN:
        yield
        return
    num_cases = 0

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal num_cases
        num_cases = len(args[0])
        return (args[0].movedim(0, input_axis), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return outputs.split(out, num_cases)

    # The user's own hooks see what they would see without K-FAC.
    handles = (
        model.register_forward_pre_hook(before, prepend=True),
        model.register_forward_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_case_axes(
    model: nn.Module, inputs: Tensor, input_axis: int, modules: Sequence[nn.Module]
) -> CaseAxes:
    """Find the places of the cases in a few passes over one or two cases of `inputs` [N, ...].

    The model takes the cases along `input_axis`.

    Raises:
        InvalidSpecError: the outputs have no place of the cases, or the passes do not show it.
    """
    probe = _Probe(model, input_axis, modules)
    two, three = (inputs[:1].repeat(n, *[1] * (inputs.dim() - 1)) for n in (2, 3))
    other: _Seen | None = None
    try:
        few, many = probe.run(two), probe.run(three)
        if any(_is_shared(*pair) for pair in few.pairs(many)):
            changed = _with_another_case(two, inputs)
            other = None if changed is None else probe.run(changed, few.captures)
    except KfacDistError:
        raise
    except Exception as error:
        # A model of one fixed number of cases, such as the nodes of a graph. If it is an error of
        # the model itself, the pass over the whole batch raises it again.
        if input_axis != 0:
            raise
        if inputs.dim() == 1:
            raise InvalidSpecError(
                f"the model does not run on two cases, inputs of shape (2,): {error}. If inputs of "
                f"shape {tuple(inputs.shape)} are one case, give inputs.unsqueeze(0)"
            ) from error
        _LOG.info("the model does not run on 2 or 3 cases, so its axes are not known: %s", error)
        return CaseAxes(PLAIN, inputs.dim(), {})
    places = {
        module: tuple(
            _place(a, b, None if other is None else other.values(module, number))
            for number, (a, b) in enumerate(zip(few.calls(module), many.calls(module), strict=True))
        )
        for module in modules
        if len(few.calls(module)) == len(many.calls(module))
    }
    last = None if other is None else other.outputs
    return CaseAxes(
        outputs=_output_place(few.outputs, many.outputs, last),
        num_output_dims=few.outputs.dim(),
        calls=places,
    )


@dataclass(frozen=True)
class _Seen:
    """What one pass has seen."""

    outputs: Tensor
    captures: Captures

    def calls(self, module: nn.Module) -> list[Tensor]:
        return [call.inputs for call in self.captures[module]]

    def values(self, module: nn.Module, number: int) -> Tensor | None:
        calls = self.calls(module)
        return calls[number] if number < len(calls) else None

    def pairs(self, more: _Seen) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.outputs, more.outputs
        for module in self.captures:
            yield from zip(self.calls(module), more.calls(module), strict=False)


class _Probe:
    """Passes that change nothing, and draw the same random numbers each time."""

    def __init__(self, model: nn.Module, input_axis: int, modules: Iterable[nn.Module]) -> None:
        self._model = model
        self._input_axis = input_axis
        self._modules = tuple(dict.fromkeys([*modules, *batch_norms(model)]))

    def run(self, cases: Tensor, like: Captures | None = None) -> _Seen:
        """Run the model; batch normalisations use the statistics of `like`, if it is given."""
        inputs = cases.movedim(0, self._input_axis).contiguous()
        with ExitStack() as stack:
            stack.enter_context(own_passes(self._model))
            stack.enter_context(torch.enable_grad())  # for models of derivatives
            stack.enter_context(running_statistics_kept(self._model))
            captures = stack.enter_context(capturing(self._modules))
            if like is not None:
                stack.enter_context(batch_statistics_fixed(self._model, like))
            outputs = self._model(inputs)
        return _Seen(full_outputs(outputs, self._model).detach(), captures)


def _changed_axes(few: Tensor, many: Tensor) -> list[int] | None:
    """Return the axes whose lengths differ, None if the tensors cannot be compared."""
    if few.dim() != many.dim() or 0 in few.shape or 0 in many.shape:
        return None
    return [axis for axis in range(few.dim()) if few.shape[axis] != many.shape[axis]]


def _is_shared(few: Tensor, many: Tensor) -> bool:
    """Return whether one axis has cases and positions, as many of these in both."""
    axes = _changed_axes(few, many)
    if axes is None or len(axes) != 1:
        return False
    per_case, rest = divmod(few.shape[axes[0]], 2)
    return rest == 0 and per_case > 1 and many.shape[axes[0]] == 3 * per_case


def _place(few: Tensor, many: Tensor, other: Tensor | None) -> Place:
    axes = _changed_axes(few, many)
    if axes == []:
        return NoAxis.WITHOUT_CASES
    if axes is None or len(axes) != 1:
        return NoAxis.UNKNOWN
    if (few.shape[axes[0]], many.shape[axes[0]]) == (2, 3):
        return CaseAxis(axes[0], Order.CASES)
    if other is None or other.shape != few.shape or not _is_shared(few, many):
        return NoAxis.UNKNOWN
    order = _order(few.movedim(axes[0], 0), other.movedim(axes[0], 0))
    return NoAxis.UNKNOWN if order is None else CaseAxis(axes[0], order)


def _order(few: Tensor, other: Tensor) -> Order | None:
    """Return the order of cases and positions along axis 0, where the second case was changed."""
    difference = (few.double() - other.double()).abs().reshape(len(few), -1).amax(dim=1)
    changed = difference > 1e-4 * difference.max()
    rows = torch.arange(len(few), device=few.device)
    if not changed.any():
        return None
    outside = not changed[rows < len(few) // 2].any()
    inside = not changed[rows % 2 == 0].any()
    if outside == inside:
        return None
    return Order.CASES_OUTSIDE if outside else Order.CASES_INSIDE


def _with_another_case(two: Tensor, inputs: Tensor) -> Tensor | None:
    """Return two cases of which the second is another one; None if there is no other."""
    differs = (inputs != inputs[:1]).reshape(len(inputs), -1).sum(dim=1)
    number = int(differs.argmax())
    another = inputs[number]
    if differs[number] == 0:
        if not inputs.is_floating_point():
            return None
        another = another + 1
    return torch.stack([two[0], another])


def _output_place(few: Tensor, many: Tensor, other: Tensor | None) -> CaseAxis:
    place = _place(few, many, other)
    if isinstance(place, CaseAxis):
        return place
    if (few.shape[:1], many.shape[:1]) == ((2,), (3,)):
        return PLAIN
    shapes = f"{tuple(few.shape)} for 2 cases and {tuple(many.shape)} for 3"
    if place is NoAxis.WITHOUT_CASES:
        raise InvalidSpecError(
            f"the outputs of the model have shape {shapes}, so they have no axis of cases. Return "
            "the outputs of each case; if cases do not lie along axis 0 of the inputs, give "
            "case_axis"
        )
    raise InvalidSpecError(
        f"the outputs of the model have shape {shapes}, which does not tell where the cases are; "
        "return them as [cases, ...]"
    )
