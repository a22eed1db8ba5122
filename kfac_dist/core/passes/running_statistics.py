"""Running statistics of normalisations, which only the gradient's pass may change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from kfac_dist.core.passes.capture import Captures

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def training_norms(model: nn.Module) -> list[_NormBase]:
    """Return the normalisations in training mode that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Hide the running statistics from normalisations in training mode, which do not read them.

    Extra passes leave them unchanged, and forward mode under vmap, which cannot update them, works.
    """
    with ExitStack() as stack:
        for module in training_norms(model):
            stack.enter_context(_hidden(module))
        yield


@contextmanager
def _hidden(module: _NormBase) -> Iterator[None]:
    kept = {name: module._buffers[name] for name in _RUNNING if name in module._buffers}
    module.track_running_stats = False
    module._buffers.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        module._buffers.update(kept)
        module.track_running_stats = True


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the modules that normalise by the statistics of the batch, which couples its cases."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


@contextmanager
def batch_statistics_fixed(model: nn.Module, captures: Captures) -> Iterator[None]:
    """Let batch normalisations use the statistics of the captured calls as constants.

    A pass over single cases then computes what each case contributed to the pass of the batch. If
    a module was called several times, the calls use their statistics in turn, so every pass in
    this context must make as many calls as the captured one.
    """
    with ExitStack() as stack:
        for module in batch_norms(model):
            if captures[module]:
                moments = [_moments(call.inputs) for call in captures[module]]
                stack.enter_context(_with_forward(module, moments))
        yield


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, inputs.dim())]
    return inputs.mean(axes), inputs.var(axes, unbiased=False)


@contextmanager
def _with_forward(module: _BatchNorm, moments: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    turn = 0

    def forward(inputs: Tensor) -> Tensor:
        nonlocal turn
        mean, var = moments[turn % len(moments)]
        turn += 1
        return F.batch_norm(inputs, mean, var, module.weight, module.bias, eps=module.eps)

    # Set on the instance, so that `functional_call` and the module's hooks still work.
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
