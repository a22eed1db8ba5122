"""What K-FAC sees of a user's training loop: the inputs of the model's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist.optim.model_calls import ModelCall, ModelCalls


class ForwardObserver:
    """Keeps the inputs of forward passes in training mode with gradients enabled.

    It keeps them only while `wants()` is true, in the steps that need statistics, as `calls` reads
    them.

    Raises:
        InvalidSpecError: in such a pass, the model was called with inputs that cannot be divided
            into cases.
    """

    def __init__(self, model: nn.Module, wants: Callable[[], bool], calls: ModelCalls) -> None:
        self._wants = wants
        self._calls = calls
        self._inputs: list[ModelCall] = []
        self._paused = False
        model.register_forward_pre_hook(self._observe, with_kwargs=True)

    # The decorator has no types. Compiled models must run the hook as plain Python.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or not (module.training and torch.is_grad_enabled()):
            return
        if self._wants():
            self._inputs.append(self._calls.read(plain_module(module), args, kwargs))

    def pop_inputs(self) -> list[ModelCall]:
        """Return the calls since the last call, in order, and forget them."""
        taken, self._inputs = self._inputs, []
        return taken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe no passes inside: they are K-FAC's own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def plain_module(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group that most likely reduces the gradients of a model.

    It is the group of DistributedDataParallel, or else the default group of torch.distributed;
    None if that is not initialised.
    """
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
