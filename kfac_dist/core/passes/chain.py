"""Models that are a chain of linear and elementwise modules, and what a pass over one has seen.

What is derived from the trace of the gradient's pass needs no forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.capture import Captures
from kfac_dist.core.vector import rows_at

_ELEMENTWISE = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The inputs of the modules of a chain, in order, and its outputs, each [N, ...].

    Of the parameters that the pass was done with, and of them alone.
    """

    inputs: tuple[Tensor, ...]
    outputs: Tensor

    @classmethod
    def of(cls, modules: Sequence[nn.Module], captures: Captures, outputs: Tensor) -> Trace:
        """Return the trace of a pass in which the modules of the chain were observed."""
        calls = [captures[module] for module in modules]
        return cls(inputs=tuple(call.inputs for (call,) in calls), outputs=outputs.detach())

    def take(self, positions: Sequence[int]) -> Trace:
        """Return the cases at these positions; the trace itself when they are all."""
        if len(positions) == len(self.outputs):
            return self
        inputs = tuple(rows_at(values, positions) for values in self.inputs)
        return Trace(inputs=inputs, outputs=rows_at(self.outputs, positions))

    def calls(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and the outputs of each module, in order."""
        yield from zip(self.inputs, (*self.inputs[1:], self.outputs), strict=True)


def chain_of(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the modules of which a model is a chain; None if it is none, or of other modules.

    Random modules are not among those: the trace would be of other draws.
    """
    modules = tuple(_leaves(model))
    known = all(_is_known(module) for module in modules)
    return modules if known and modules and len(set(modules)) == len(modules) else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential and not _has_hooks(module):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _is_known(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Flatten, *_ELEMENTWISE)
    return type(module) in kinds and not (_has_hooks(module) or getattr(module, "inplace", False))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def slopes(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the derivative of an elementwise module at each element, [N, ...].

    From the outputs where they tell it: a transcendental function costs as much as ten products.
    """
    if isinstance(module, nn.Tanh):
        return torch.addcmul(outputs.new_ones(()), outputs, outputs, value=-1)
    if isinstance(module, nn.Sigmoid):
        return torch.addcmul(outputs, outputs, outputs, value=-1)
    if isinstance(module, nn.ReLU):
        return (outputs > 0).to(outputs.dtype)
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(module(leaf).sum(), leaf)
    return derivative
