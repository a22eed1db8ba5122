"""Which models the optimizers accept, and whether a model is still the one they were made for."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from kfac_dist.core.vector import trainable_parameters
from kfac_dist.errors import InvalidSpecError

_TYPES = (torch.float32, torch.float64)
_PATH = " (kfac-dist train, docs/tasks.md)"
_GOES_ON = ". It can load the state of this one if all layers of this one are still there"
_WHOLE = "K-FAC needs whole layers in every process"


def check_model(model: nn.Module, owner: str) -> None:
    """Check that the passes of K-FAC can observe the layers of `model` and train its parameters.

    Raises:
        InvalidSpecError: they cannot; the message begins with `owner` and says what would be right.
    """
    if not isinstance(model, nn.Module):
        raise InvalidSpecError(
            f"{owner}: model is {type(model).__name__}; it must be a torch.nn.Module, because "
            "K-FAC observes its layers"
        )
    for name, module in model.named_modules():
        why = _refused_wrapper(module, owner)
        if why:
            where = f"the module {name!r}" if name else "the model"
            raise InvalidSpecError(f"{owner}: {where} is {type(module).__name__}. {why}")
    for name, parameter in trainable_parameters(model).items():
        _check_parameter(name, parameter, owner)
    _check_alike(trainable_parameters(model), owner)


def _refused_wrapper(module: nn.Module, owner: str) -> str:
    """Return why a module cannot be observed, "" if it can."""
    if isinstance(module, DistributedDataParallel):
        if owner == "KFAC":
            return (
                "KFAC computes gradients of its own, which this wrapper does not sum, so the "
                f"processes would drift apart. Submit a job{_PATH}, or use KFACPreconditioner, "
                "which takes the wrapped model"
            )
        return "Only the whole model may be wrapped in it, not a part"
    if isinstance(module, nn.DataParallel):
        return (
            "Its replicas cannot be observed. Pass the module inside it, or use "
            "DistributedDataParallel with KFACPreconditioner"
        )
    sharded = sys.modules.get("torch.distributed.fsdp")
    if sharded is not None and isinstance(module, sharded.FullyShardedDataParallel):
        return f"It shards the parameters, but {_WHOLE}. Use DistributedDataParallel"
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "Layers of scripted and traced models cannot be observed. Pass the model that it was "
            "made from; torch.compile is possible"
        )
    return ""


def _check_parameter(name: str, parameter: nn.Parameter, owner: str) -> None:
    if is_lazy(parameter):
        raise InvalidSpecError(
            f"{owner}: {name} has no shape yet. Call the model once on a batch before you make "
            f"{owner}"
        )
    # Not imported here: it takes a second, and without it there is no such parameter.
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(parameter, tensors.DTensor):
        raise InvalidSpecError(
            f"{owner}: {name} is a DTensor, which is spread over processes (fully_shard, tensor "
            f"parallelism), but {_WHOLE}. Use DistributedDataParallel"
        )
    if parameter.is_meta:
        raise InvalidSpecError(
            f"{owner}: {name} is on the device meta, where it has no values. Move the model to a "
            f"device with to_empty and set its values before you make {owner}"
        )
    if parameter.numel() == 0:
        raise InvalidSpecError(
            f"{owner}: {name} has the shape {tuple(parameter.shape)} and so no elements. Remove "
            "the layer, or freeze it with requires_grad_(False)"
        )
    if parameter.dtype not in _TYPES:
        right = "autocast for the passes in half precision"
        if owner == "KFAC":
            right = "model.float(), or KFACPreconditioner and autocast"
        raise InvalidSpecError(
            f"{owner}: {name} is {parameter.dtype}; parameters must be float32 or float64. Use "
            f"{right}"
        )


def _check_alike(parameters: Mapping[str, Tensor], owner: str) -> None:
    """Check that all parameters have one type and one device: they are one vector."""
    places = {name: (p.dtype, str(p.device)) for name, p in parameters.items()}
    for name, place in places.items():
        first, first_place = next(iter(places.items()))
        if place != first_place:
            raise InvalidSpecError(
                f"{owner}: {first} is {first_place[0]} on {first_place[1]}, but {name} is "
                f"{place[0]} on {place[1]}; all trainable parameters must have one type and one "
                "device"
            )


class ModelGuard:
    """Remembers the trainable parameters of a model, to notice when they are others.

    The blocks of the curvature belong to the layers that were there at the start. `owner` begins
    the messages.
    """

    def __init__(self, model: nn.Module, owner: str) -> None:
        self._model = model
        self._owner = owner
        self._known = trainable_parameters(model)
        self._like = _likeness(self._known)

    def check(self) -> None:
        """Check that the model still has these parameters, of the same shapes and type.

        Raises:
            InvalidSpecError: a parameter was added, removed, replaced, frozen, unfrozen, moved,
                converted or reshaped.
        """
        now = trainable_parameters(self._model)
        changes = self._changes(now)
        if changes:
            raise InvalidSpecError(
                f"{self._owner}: the model has changed since {self._owner} was made: "
                f"{'; '.join(changes)}. Make a new {self._owner} for the changed model"
                + ("" if self._owner == "KFAC" else _GOES_ON)
            )

    def _changes(self, now: Mapping[str, nn.Parameter]) -> list[str]:
        gone = [name for name in self._known if name not in now]
        new = [name for name in now if name not in self._known]
        both = [name for name in now if name in self._known]
        other = [name for name in both if now[name] is not self._known[name]]
        likeness = _likeness(now)
        moved = [
            f"{name} was {_words(self._like[name])} and is {_words(likeness[name])}"
            for name in both
            if name not in other and likeness[name] != self._like[name]
        ]
        still_there = dict(self._model.named_parameters())
        frozen = [name for name in gone if name in still_there]
        removed = [name for name in gone if name not in still_there]
        lists = (("frozen", frozen), ("removed", removed), ("new or unfrozen", new))
        parts = [f"{word}: {_some(names)}" for word, names in lists if names]
        if other:
            parts.append(f"replaced: {_some(other)}")
        return [*parts, *moved[:1]]


_Likeness = tuple[torch.Size, torch.dtype, torch.device]


def _likeness(parameters: Mapping[str, Tensor]) -> dict[str, _Likeness]:
    return {name: (p.shape, p.dtype, p.device) for name, p in parameters.items()}


def _words(likeness: _Likeness) -> str:
    shape, dtype, device = likeness
    return f"{list(shape)} {dtype} on {device}"


def _some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
