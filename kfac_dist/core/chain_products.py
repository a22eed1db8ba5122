"""Products of the Jacobian of a chain of modules, from what its gradient pass has seen.

The chain's own forward pass is not done again, which is a third of the work for two vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.core.capture import Captures
from kfac_dist.core.vector import trainable_parameters, unflatten

_ELEMENTWISE = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU)
Tangents = Mapping[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The inputs of the modules of a chain, in order, and its outputs, each [N, ...].

    Of the parameters that the pass was done with, and of them alone.
    """

    inputs: tuple[Tensor, ...]
    outputs: Tensor

    def take(self, positions: Sequence[int]) -> Trace:
        """Return the cases at these positions; the trace itself when they are all."""
        if len(positions) == len(self.outputs):
            return self
        rows = torch.tensor(positions, dtype=torch.int64, device=self.outputs.device)
        return Trace(inputs=tuple(x[rows] for x in self.inputs), outputs=self.outputs[rows])


class ChainProducts:
    """`J v` for `modules` that are applied one after another, each once."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._parameters: list[Tensor] = list(trainable_parameters(model).values())

    def trace(self, captures: Captures, outputs: Tensor) -> Trace:
        """Return the trace of a pass in which the modules were observed."""
        calls = [captures[module] for module in self.modules]
        return Trace(inputs=tuple(call.inputs for (call,) in calls), outputs=outputs.detach())

    def of(self, trace: Trace, vectors: Sequence[Tensor]) -> Tensor:
        """Return the products with `vectors` [P] each, [m, *outputs.shape]."""
        tangents = [
            dict(zip(self._parameters, unflatten(vector, self._parameters), strict=True))
            for vector in vectors
        ]
        derivative: Tensor | None = None
        with torch.no_grad():
            for module, inputs in zip(self.modules, trace.inputs, strict=True):
                derivative = _through(module, inputs, derivative, tangents)
        if derivative is None:
            return trace.outputs.new_zeros((len(vectors), *trace.outputs.shape))
        return derivative


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


def _through(
    module: nn.Module, inputs: Tensor, before: Tensor | None, tangents: Sequence[Tangents]
) -> Tensor | None:
    """Return the derivatives [m, N, ...] of a module's outputs, from those of its inputs.

    None is zero.
    """
    if isinstance(module, nn.Linear):
        return _through_linear(module, inputs, before, tangents)
    if before is None:
        return None
    if isinstance(module, nn.Flatten):
        return torch.stack([module(derivative) for derivative in before])
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(module(leaf).sum(), leaf)
    return before.mul_(slopes)


def _through_linear(
    module: nn.Linear, inputs: Tensor, before: Tensor | None, tangents: Sequence[Tangents]
) -> Tensor:
    rows = inputs.reshape(-1, module.in_features)
    after = rows.new_zeros((len(tangents), len(rows), module.out_features))
    for product, tangent in zip(after, tangents, strict=True):
        if module.weight in tangent:
            product.addmm_(rows, tangent[module.weight].T, beta=0)
        if module.bias is not None and module.bias in tangent:
            product.add_(tangent[module.bias])
    if before is not None:
        flat = before.reshape(-1, module.in_features)
        after.view(-1, module.out_features).addmm_(flat, module.weight.T)
    return after.view(len(tangents), *inputs.shape[:-1], module.out_features)
