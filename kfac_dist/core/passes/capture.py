"""Observing the calls of modules in a forward pass, without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_dist.core.passes.outputs import full


@dataclass(frozen=True)
class Call:
    """One call of a module: its input, and the shape and the autograd edge of its output.

    `number` counts the calls of the module in the pass from 0.

    The edge is recorded at the call, so operations that later overwrite the output in place do
    not change it. It is None if the output needs no gradient.
    """

    inputs: Tensor
    shape: torch.Size
    edge: GradientEdge | None
    number: int = 0


Captures = dict[nn.Module, list[Call]]


@contextmanager
def capturing(modules: Iterable[nn.Module]) -> Iterator[Captures]:
    """Collect the calls of `modules` in the passes inside this context, in order."""
    captures: Captures = {module: [] for module in modules}

    def hook(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        edge = get_gradient_edge(_written_by(out)) if out.requires_grad else None
        calls = captures[module]
        calls.append(Call(full(inputs.detach()), out.shape, edge, len(calls)))

    # Before all other hooks, so that the output is still the module's own.
    handles = [
        module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module in captures
    ]
    try:
        yield captures
    finally:
        for handle in handles:
            handle.remove()


def _written_by(out: Tensor) -> Tensor:
    """Return the base of an output that is all of it in another shape, else the output.

    Writing in place into a view moves its history to its base, so only the edge of that stays.
    """
    base = out._base
    if base is None or not base.requires_grad or base.numel() != out.numel():
        return out
    return base if base.is_contiguous() and out.is_contiguous() else out


Gradients = dict[nn.Module, list[Tensor]]


def output_gradients(outputs: Tensor, captures: Captures, derivative: Tensor) -> Gradients:
    """Return the derivatives with respect to the outputs of all calls, shaped like these.

    `derivative` is the one with respect to `outputs`, the outputs of the model. Calls on which
    these do not depend have zeros.
    """
    edges = [call.edge for calls in captures.values() for call in calls if call.edge is not None]
    values: Sequence[Tensor | None] = ()
    if edges and outputs.requires_grad:
        values = torch.autograd.grad(
            outputs, edges, derivative, retain_graph=True, allow_unused=True
        )
    by_edge = dict(zip(map(id, edges), values, strict=False))
    return {
        module: [_or_zeros(by_edge.get(id(call.edge)), call, derivative) for call in calls]
        for module, calls in captures.items()
    }


def _or_zeros(gradient: Tensor | None, call: Call, like: Tensor) -> Tensor:
    if gradient is None:
        return like.new_zeros(call.shape)
    return full(gradient).reshape(call.shape)
