"""K-FAC's own passes over a model, which leave everything else as they found it.

The gradient's pass is the user's training pass, and it may change the model's buffers and move the
random streams. Passes for statistics, Fisher products and measurements come on top of it. A
training loop must not notice that they took place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Restore = Callable[[], None]
# What every module has: its parameters, parts and hooks, which passes do not change.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NUMPY_SEEDS = 1 << 32


class RandomStreams:
    """The state of every random stream that a pass over `model` may draw from.

    They are those of torch on the CPU and on the model's GPUs, of Python, of numpy, and the
    generators that modules have as attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self._generators = [torch.default_generator]
        self._generators += [torch.cuda.default_generators[d.index or 0] for d in devices]
        self._generators += [
            value
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]
        self._states = [generator.get_state() for generator in self._generators]
        self._python = random.getstate()
        # Data augmentation inside models draws from numpy, where it is imported at all.
        self._numpy: Any = sys.modules.get("numpy")
        self._numpy_state = self._numpy.random.get_state() if self._numpy else None

    def restore(self) -> None:
        """Set the streams back to this state."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy:
            self._numpy.random.set_state(self._numpy_state)

    def seed(self, key: int) -> None:
        """Let all streams start from a key that is at least 0."""
        for generator in self._generators:
            generator.manual_seed(key)
        random.seed(key)
        if self._numpy:
            self._numpy.random.seed(key % _NUMPY_SEEDS)


@contextmanager
def own_passes(model: nn.Module) -> Iterator[RandomStreams]:
    """Leave random streams and what modules keep from pass to pass as they were.

    Modules keep buffers, and attributes that are numbers, tensors, lists or dicts, such as
    counters, the vectors of a spectral norm, and running averages. The value is the streams, for a
    pass that starts from a state of its own.
    """
    streams = RandomStreams(model)
    kept = [restore for module in model.modules() for restore in _kept(module)]
    try:
        yield streams
    finally:
        for restore in kept:
            restore()
        streams.restore()


def _kept(module: nn.Module) -> Iterator[Restore]:
    """Yield functions that set back what a module keeps from pass to pass."""
    for name, buffer in module._buffers.items():
        yield _kept_entry(module._buffers, name, buffer)
    attributes = vars(module)
    for name, value in attributes.items():
        if name not in _OF_EVERY_MODULE and isinstance(value, int | float | Tensor):
            yield _kept_entry(attributes, name, value)
        elif name not in _OF_EVERY_MODULE and type(value) in (list, dict):
            yield _kept_content(value)


def _kept_entry(entries: dict[str, Any], name: str, value: Any) -> Restore:
    writable = isinstance(value, Tensor) and _is_writable(value)
    copy = value.detach().clone() if writable else None

    def restore() -> None:
        entries[name] = value
        if copy is not None:
            # A graph of the user's may have saved the tensor, and its version must stay.
            value.data.copy_(copy)

    return restore


def _is_writable(value: Tensor) -> bool:
    """Return whether a tensor can be changed in place, as can be none that repeats elements."""
    if value.layout != torch.strided or value.grad_fn is not None:
        return False
    return all(
        stride or size <= 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )


def _kept_content(value: list[Any] | dict[Any, Any]) -> Restore:
    copy = value.copy()

    def restore() -> None:
        value.clear()
        if isinstance(value, dict):
            value.update(copy)
        else:
            value.extend(copy)

    return restore
