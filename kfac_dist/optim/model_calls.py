"""How K-FAC reads the calls of a model: what their cases are, and which of their results count.

K-FAC's own passes repeat a call of the training loop on some of its cases. They are asked for by
number, so a pass has one tensor of inputs, however many arguments the call has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.running_statistics import batch_norms
from kfac_dist.errors import InvalidSpecError

Arguments = Mapping[str, Any]

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True, kw_only=True)
class ModelCalls:
    """How the calls of a model are read.

    A call is given to these functions as its arguments by name; positional arguments have the names
    that the model's `forward` gives them, or "0", "1" and so on. In all tensors of a call, inside
    lists, tuples and dicts too, the first axis is the cases. A first axis of length 1 and a tensor
    without axes hold for all cases.

    Args:
        outputs: returns the outputs, which parametrise the distribution, from what the model
            returns. They are [N, ...] for N cases.
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

    def read(self, model: nn.Module, args: Sequence[Any], kwargs: Arguments) -> ModelCall:
        """Return a call of a model, its tensors detached.

        Raises:
            InvalidSpecError: an argument is of a type that cannot be divided into cases, or
                tensors have different numbers of cases.
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
        num_cases = self._num_cases(name, arguments)

        def whole(tensor: Tensor) -> Tensor | _Whole:
            return _Whole(tensor) if tensor.dim() == 0 or len(tensor) != num_cases else tensor

        return ModelCall(
            reader=self,
            model=name,
            positional=tuple(name for name in positional if name in arguments),
            arguments={
                key: _mapped(key, value, _Whole if key in self.shared else whole)
                for key, value in arguments.items()
            },
            num_cases=num_cases,
        )

    def _num_cases(self, model: str, arguments: Arguments) -> int:
        found = [
            (name, tensor)
            for name, value in arguments.items()
            if name not in self.shared
            for tensor in _tensors(value)
            if tensor.dim()
        ]
        different = {len(tensor) for _, tensor in found} - {1}
        # One case, and a vector of something else? Or cases that are numbers, and one row for all?
        unclear = (
            len(different) == 1
            and all(tensor.dim() == 1 for _, tensor in found if len(tensor) != 1)
            and any(tensor.dim() > 1 for _, tensor in found)
        )
        if len(different) > 1 or unclear:
            listed = ", ".join(f"{name} has {len(tensor)}" for name, tensor in found)
            raise InvalidSpecError(
                f"KFACPreconditioner: {model} was called with tensors whose first axes differ: "
                f"{listed}. The first axis must be the cases. Name the arguments where it is not "
                "in calls=ModelCalls(shared=[...])"
            )
        if not found:
            raise InvalidSpecError(
                f"KFACPreconditioner: {model} was called with {len(arguments)} arguments and no "
                "tensor that has an axis of cases; at least one must have the cases along its "
                "first axis"
            )
        return different.pop() if different else 1


@dataclass(frozen=True)
class _Whole:
    """A tensor that holds for all cases."""

    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of a model with `num_cases` cases.

    `positional` are the names of its positional arguments, in order.
    """

    reader: ModelCalls
    model: str
    positional: tuple[str, ...]
    arguments: Arguments
    num_cases: int

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the call."""
        for value in self.arguments.values():
            yield from _tensors(value)

    def parts(self, cases: Sequence[int]) -> Iterator[ModelCall]:
        """Yield calls with the cases at these places, those of equal lengths without padding.

        Raises:
            InvalidSpecError: padding is not on the right, or a case is only padding.
        """
        some = self if len(cases) == self.num_cases else self.take(torch.tensor(cases))
        masks = [name for name in self.reader.padded if some.arguments.get(name) is not None]
        if not masks or not cases:
            yield some
            return
        lengths = torch.stack([some._lengths(name, cases) for name in masks], dim=1)
        for distinct in torch.unique(lengths, dim=0):
            part = some.take((lengths == distinct).all(dim=1).nonzero().squeeze(1))
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
        """Return all arguments by name."""
        return {name: _opened(value) for name, value in self.arguments.items()}

    def to_pass(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments that are not left out: the positional ones, and those by name."""
        named = dict(self.named())
        args = []
        for name in self.positional:
            if name in self.reader.left_out:
                break  # those behind it follow by name
            args.append(named.pop(name))
        return args, {k: v for k, v in named.items() if k not in self.reader.left_out}

    def _lengths(self, name: str, cases: Sequence[int]) -> Tensor:
        """Return the number of positions of each case from its padding mask, [N]."""
        mask = self.arguments[name]
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            found = [list(tensor.shape) for tensor in _tensors(mask)] or type(mask).__name__
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
                f"KFACPreconditioner: in {name} of {self.model}, case {cases[place]} is "
                f"{mask[place].int().tolist()}; it must be ones and then zeros, with at least one "
                'one: pad on the right (padding_side="right" for a tokenizer)'
            )
        return lengths.cpu()

    def _trimmed(self, mask: str, length: int) -> ModelCall:
        """Return the call without the positions behind a length, where this mask holds."""
        width = self.arguments[mask].shape[1]
        arguments = dict(self.arguments)
        for name in {mask, *self.reader.padded[mask]}:
            for value in _tensors(arguments.get(name)):
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

    def parts(self, call: ModelCall, cases: Sequence[int]) -> list[ModelCall]:
        """Return the parts of a call with the cases at these places, as `ModelCall.parts` does.

        Raises:
            InvalidSpecError: there are several parts, and batch normalisation couples the cases.
        """
        parts = list(call.parts(cases))
        if len(parts) > 1 and batch_norms(self):
            raise InvalidSpecError(
                f"KFACPreconditioner: {call.model} has batch normalisation, and its cases have "
                f"{len(parts)} different lengths without their padding, so statistics of the whole "
                "batch cannot be repeated; give all cases of a batch one length"
            )
        return parts

    @contextmanager
    def repeating(self, call: ModelCall) -> Iterator[Tensor]:
        """Give the numbers of all cases of a call; passes inside repeat this call."""
        self.__dict__["call"] = call
        like = next(tensor for tensor in call.tensors() if tensor.dim())
        try:
            with _without_autocast(self.__dict__["inner"]):
                yield torch.arange(call.num_cases, device=like.device)
        finally:
            self.__dict__["call"] = None

    def forward(self, cases: Tensor) -> Tensor:
        """Return the outputs for the cases with these numbers, [n, ...].

        Raises:
            InvalidSpecError: the model returns something else than one tensor for these cases.
        """
        call: ModelCall = self.__dict__["call"].take(cases)
        args, kwargs = call.to_pass()
        outputs = _outputs(call, self.__dict__["inner"](*args, **kwargs))
        if outputs.dim() == 0 or len(outputs) % call.num_cases:
            raise InvalidSpecError(
                f"KFACPreconditioner: the outputs of {call.model} are {list(outputs.shape)} for "
                f"{call.num_cases} cases; the first axis of inputs and outputs must be the cases"
            )
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


def _names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first positional arguments, or their numbers if they have none."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return named[:count] if count <= len(named) else [str(place) for place in range(count)]


def _outputs(call: ModelCall, result: Any) -> Tensor:
    reader = call.reader
    outputs = result if reader.outputs is None else reader.outputs(result)
    if isinstance(outputs, Tensor):
        return outputs
    keys = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    what = f"{call.model} returns" if reader.outputs is None else "calls.outputs returns"
    raise InvalidSpecError(
        f"KFACPreconditioner: {what} {type(outputs).__name__}{keys}; K-FAC needs the one tensor "
        "that parametrises the distribution. Name it, for example with "
        "calls=ModelCalls(outputs=lambda result: result.logits)"
    )


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


def _opened(value: Any) -> Any:
    """Return a value with the tensors that hold for all cases as they are."""
    return _mapped("", value, lambda tensor: tensor, lambda whole: whole.tensor)


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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Whole):
        yield value.tensor
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
