"""How K-FAC reads the calls of a model: what their cases are, and which of their results count.

`ModelCalls` also says which positions are padding, and which the loss leaves out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.outputs import checked_outputs
from kfac_dist.errors import InvalidSpecError

Arguments = Mapping[str, Any]

_NAME_OUTPUTS = (
    "Name it, for example with calls=ModelCalls(outputs=lambda result: result.logits), or wrap the "
    "model in a module that returns only it"
)
_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True, kw_only=True)
class ModelCalls:
    """How the calls of a model are read.

    A call is given to these functions as its arguments by name; positional arguments have the names
    that the model's `forward` gives them, or "0", "1" and so on. In all tensors of a call, inside
    lists, tuples and dicts too, the first axis is the cases, or that with the number `case_axis` of
    the preconditioner. If its length is 1, or a tensor does not have it, the tensor holds for all
    cases.

    Args:
        outputs: returns the outputs, which parametrise the distribution, from what the model
            returns.
        left_out: names of arguments that K-FAC's own passes leave out, such as labels for a loss
            that the model computes itself.
        shared: names of arguments whose first axis is not the cases.
        prepare: returns the arguments of K-FAC's own passes from those of a call.
        padded: names of padding masks [N, T], 1 at positions that a case has and 0 at padding, each
            with the names of the arguments whose second axis is the same T positions. Cases are
            then computed without their padding, so that the curvature is that of the cases one by
            one. Padding must be on the right.
        counted: returns which positions of the outputs the loss counts, as a boolean tensor shaped
            like the first axes of the outputs; None for all. It is given the arguments of the
            cases, with those that are left out.
    """

    outputs: Callable[[Any], Tensor] | None = None
    left_out: Sequence[str] = ()
    shared: Sequence[str] = ()
    prepare: Callable[[Arguments], Arguments] | None = None
    padded: Mapping[str, Sequence[str]] = field(default_factory=dict)
    counted: Callable[[Arguments], Tensor | None] | None = None

    def outputs_of(self, model: str, result: Any) -> Tensor:
        """Return the outputs from what a model of this name returned.

        Raises:
            InvalidSpecError: they are not one tensor.
        """
        outputs = result if self.outputs is None else self.outputs(result)
        who = f"KFACPreconditioner: {model}" if self.outputs is None else "calls.outputs"
        return checked_outputs(outputs, who, _NAME_OUTPUTS)

    def read(
        self, model: nn.Module, args: Sequence[Any], kwargs: Arguments, case_axis: int = 0
    ) -> ModelCall:
        """Return a call of a model, its tensors detached and with the cases first.

        Raises:
            InvalidSpecError: an argument is of a type that cannot be divided into cases, tensors
                have different numbers of cases, or padding is not on the right.
        """
        name = type(model).__name__
        positional = _names(model, len(args))
        if positional and positional[0] == "0" and self != ModelCalls(outputs=self.outputs):
            raise InvalidSpecError(
                f"KFACPreconditioner: {name} was called with {len(args)} positional arguments, and "
                "its forward does not name them; call it with keywords, model(input_ids=...), so "
                "that calls=ModelCalls(...) can name them"
            )
        named = dict(zip(positional, args, strict=True)) | dict(kwargs)
        arguments: Arguments = {
            key: _mapped(f"{name} was called with {key}", value, Tensor.detach)
            for key, value in named.items()
            if key not in self.left_out or isinstance(value, Tensor)
        }
        if self.prepare is not None:
            arguments = self.prepare(arguments)
        num_cases = self._num_cases(name, arguments, case_axis)

        def whole(tensor: Tensor) -> Tensor | _Whole:
            if tensor.dim() <= case_axis or tensor.shape[case_axis] != num_cases:
                return _Whole(tensor)
            return tensor.movedim(case_axis, 0)

        call = ModelCall(
            reader=self,
            model=name,
            positional=tuple(name for name in positional if name in arguments),
            arguments={
                key: _mapped(key, value, _Whole if key in self.shared else whole)
                for key, value in arguments.items()
            },
            num_cases=num_cases,
            case_axis=case_axis,
        )
        for mask in call.masks():
            call._lengths(mask)
        return call

    def _num_cases(self, model: str, arguments: Arguments, axis: int) -> int:
        found = [
            (name, tensor)
            for name, value in arguments.items()
            if name not in self.shared
            for tensor in tensors_in(value)
            if tensor.dim() > axis
        ]
        different = {tensor.shape[axis] for _, tensor in found} - {1}
        # One case, and a vector of something else? Or cases that are numbers, and one row for all?
        unclear = (
            len(different) == 1
            and all(tensor.dim() == axis + 1 for _, tensor in found if tensor.shape[axis] != 1)
            and any(tensor.dim() > axis + 1 for _, tensor in found)
        )
        if len(different) > 1 or unclear:
            listed = ", ".join(f"{name} has {tensor.shape[axis]}" for name, tensor in found)
            raise InvalidSpecError(
                f"KFACPreconditioner: {model} was called with tensors of which axis {axis} "
                f"differs: {listed}. This axis must be the cases. Name the arguments where it is "
                "not in calls=ModelCalls(shared=[...])"
            )
        if not found:
            raise InvalidSpecError(
                f"KFACPreconditioner: {model} was called {self._shapes(arguments)}, so "
                f"they have no axis {axis} of cases; at least one must have the cases there"
            )
        return different.pop() if different else 1

    def _shapes(self, arguments: Arguments) -> str:
        shapes = [
            f"{name} of shape {tuple(tensor.shape)}"
            for name, value in arguments.items()
            for tensor in tensors_in(value)
        ]
        return ", ".join(shapes) or f"{len(arguments)} arguments and no tensor"


@dataclass(frozen=True)
class _Whole:
    """A tensor that holds for all cases."""

    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of a model with `num_cases` cases, which its tensors have first.

    `positional` are the names of its positional arguments, in order.
    """

    reader: ModelCalls
    model: str
    positional: tuple[str, ...]
    arguments: Arguments
    num_cases: int
    case_axis: int = 0

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the call."""
        for value in self.arguments.values():
            yield from tensors_in(value)

    def masks(self) -> list[str]:
        """Return the names of the padding masks that the call has."""
        return [name for name in self.reader.padded if self.arguments.get(name) is not None]

    def parts(self) -> Iterator[ModelCall]:
        """Yield calls with the cases of equal lengths, without padding."""
        masks = self.masks()
        if not masks or not self.num_cases:
            yield self
            return
        lengths = torch.stack([self._lengths(name) for name in masks], dim=1)
        for distinct in torch.unique(lengths, dim=0):
            part = self.take((lengths == distinct).all(dim=1).nonzero().squeeze(1))
            for name, length in zip(masks, distinct.tolist(), strict=True):
                part = part._trimmed(name, length)
            yield part

    def take(self, cases: Tensor) -> ModelCall:
        """Return the call with the cases at these places [n], int64."""

        def take(tensor: Tensor) -> Tensor:
            return tensor[cases.to(tensor.device)]

        arguments = {name: _mapped(name, v, take) for name, v in self.arguments.items()}
        return replace(self, arguments=arguments, num_cases=len(cases))

    def named(self) -> Arguments:
        """Return all arguments by name, as the model takes them."""

        def placed(tensor: Tensor) -> Tensor:
            return tensor.movedim(0, self.case_axis).contiguous() if self.case_axis else tensor

        return {
            name: _mapped(name, value, placed, lambda whole: whole.tensor)
            for name, value in self.arguments.items()
        }

    def changed(self, change: Callable[[Tensor], Tensor]) -> ModelCall:
        """Return the call with all its tensors changed."""
        return replace(
            self,
            arguments={
                name: _mapped(name, value, change, lambda whole: _Whole(change(whole.tensor)))
                for name, value in self.arguments.items()
            },
        )

    def to_pass(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments that are not left out: the positional ones, and those by name."""
        named = dict(self.named())
        args = []
        for name in self.positional:
            if name in self.reader.left_out:
                break  # those behind it follow by name
            args.append(named.pop(name))
        return args, {k: v for k, v in named.items() if k not in self.reader.left_out}

    def _lengths(self, name: str) -> Tensor:
        """Return the number of positions of each case from its padding mask, [N]."""
        mask = self.arguments[name]
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            found = [list(tensor.shape) for tensor in tensors_in(mask)] or type(mask).__name__
            raise InvalidSpecError(
                f"KFACPreconditioner: {name} of {self.model} is {found}; it must be a padding mask "
                f"[cases, positions], with {self.num_cases} cases here"
            )
        lengths = (mask != 0).sum(dim=1)
        right = torch.arange(mask.shape[1], device=mask.device) < lengths.unsqueeze(1)
        wrong = ((mask != 0) != right).any(dim=1) | (lengths == 0)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise InvalidSpecError(
                f"KFACPreconditioner: in {name} of {self.model}, case {place} is "
                f"{mask[place].int().tolist()}; it must be ones and then zeros, with at least one "
                'one: pad on the right (padding_side="right" for a tokenizer)'
            )
        return lengths.cpu()

    def _trimmed(self, mask: str, length: int) -> ModelCall:
        """Return the call without the positions behind a length, where this mask holds."""
        width = self.arguments[mask].shape[1]
        arguments = dict(self.arguments)
        for name in {mask, *self.reader.padded[mask]}:
            for value in tensors_in(arguments.get(name)):
                if value.dim() < 2 or value.shape[1] != width:
                    raise InvalidSpecError(
                        f"KFACPreconditioner: {name} of {self.model} is {list(value.shape)}, but "
                        f"{mask} has {width} positions; both must have the same second axis"
                    )
            arguments[name] = _mapped(
                name,
                arguments.get(name),
                lambda tensor: tensor[:, :length],
                lambda whole: _Whole(whole.tensor[:, :length]),
            )
        return replace(self, arguments={k: v for k, v in arguments.items() if v is not None})


def _names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first positional arguments, or their numbers if they have none."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return named[:count] if count <= len(named) else [str(place) for place in range(count)]


def _mapped(
    where: str,
    value: Any,
    change: Callable[[Tensor], Any],
    change_whole: Callable[[_Whole], Any] = lambda whole: whole,
) -> Any:
    """Return a value with all its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, _Whole):
        return change_whole(value)
    if isinstance(value, _CONSTANTS):
        return value

    def part(key: Any, inner: Any) -> Any:
        return _mapped(f"{where}[{key!r}]", inner, change, change_whole)

    if type(value) is dict:
        return {key: part(key, inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(part(place, inner) for place, inner in enumerate(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(part(place, inner) for place, inner in enumerate(value)))
    raise InvalidSpecError(
        f"KFACPreconditioner: {where} of type {type(value).__name__}, which K-FAC cannot divide "
        "into cases; it can divide tensors, and lists, tuples and dicts of tensors. Leave it out "
        "with calls=ModelCalls(left_out=[...]), or unpack it at the call"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, inside lists, tuples, dicts and plain objects too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, _Whole | SimpleNamespace) or is_dataclass(value):
        yield from tensors_in(vars(value))
