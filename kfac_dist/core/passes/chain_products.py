"""Products of the Jacobian of a chain of modules, and derivatives back through it, from a trace.

The chain's own forward pass is not done again: for two vectors that is a third of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.capture import Call, Captures, Gradients
from kfac_dist.core.passes.chain import Trace, slopes
from kfac_dist.core.vector import trainable_parameters, unflatten

Tangents = Mapping[Tensor, Tensor]


class ChainProducts:
    """`J v` for `modules` that are applied one after another, each once, and what lies before it.

    The trace of every method is one of these modules.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._parameters: list[Tensor] = list(trainable_parameters(model).values())

    def of(self, trace: Trace, vectors: Sequence[Tensor]) -> Tensor:
        """Return the products with `vectors` [P] each, [m, *outputs.shape]."""
        tangents = [
            dict(zip(self._parameters, unflatten(vector, self._parameters), strict=True))
            for vector in vectors
        ]
        derivative: Tensor | None = None
        with torch.no_grad():
            for module, (inputs, outputs) in zip(self.modules, trace.calls(), strict=True):
                derivative = _through(module, inputs, outputs, derivative, tangents)
        if derivative is None:
            return trace.outputs.new_zeros((len(vectors), *trace.outputs.shape))
        return derivative

    def captures(self, trace: Trace) -> Captures:
        """Return the calls of the modules; their outputs have no place in any graph."""
        return {
            module: [Call(inputs, outputs.shape, None)]
            for module, (inputs, outputs) in zip(self.modules, trace.calls(), strict=True)
        }

    def output_gradients(self, trace: Trace, derivative: Tensor) -> Gradients:
        """Return the derivatives with respect to the outputs of the linear modules.

        `derivative` is that with respect to the outputs of the chain.
        """
        calls = list(zip(self.modules, trace.calls(), strict=True))
        num_linear = sum(isinstance(module, nn.Linear) for module in self.modules)
        gradients: Gradients = {}
        with torch.no_grad():
            for module, (inputs, outputs) in reversed(calls):
                if isinstance(module, nn.Linear):
                    gradients[module] = [derivative]
                if len(gradients) == num_linear:
                    break
                derivative = _back_through(module, inputs, outputs, derivative)
        return gradients


def _through(
    module: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    before: Tensor | None,
    tangents: Sequence[Tangents],
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
    return before.mul_(slopes(module, inputs, outputs))


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


def _back_through(module: nn.Module, inputs: Tensor, outputs: Tensor, after: Tensor) -> Tensor:
    """Return the derivative with respect to a module's inputs, from that of its outputs."""
    if isinstance(module, nn.Linear):
        return after @ module.weight
    if isinstance(module, nn.Flatten):
        return after.reshape(inputs.shape)
    return after * slopes(module, inputs, outputs)
