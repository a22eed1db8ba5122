"""Products of the Jacobian of a chain of modules, and derivatives back through it, from a trace.

The forward pass of the chain is not repeated: for two vectors that saves a third of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.capture import Call, Captures, Gradients
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.passes.chain_rules import CHAIN_RULES
from kfac_dist.core.vector import trainable_parameters, unflatten


class ChainProducts:
    """Derivatives of a model that is the chain `modules`, in both directions.

    Every `trace` that a method takes is one of these modules.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._rules = [CHAIN_RULES[type(module)] for module in self.modules]
        self._parameters: list[Tensor] = list(trainable_parameters(model).values())

    def multiply(self, trace: Trace, vectors: Sequence[Tensor]) -> Tensor:
        """Return the products `J v` with m `vectors` [P], [m, *outputs.shape]."""
        tangents = [
            dict(zip(self._parameters, unflatten(vector, self._parameters), strict=True))
            for vector in vectors
        ]
        derivative: Tensor | None = None
        calls = zip(self._rules, self.modules, trace.calls(), strict=True)
        with torch.no_grad():
            for rule, module, (inputs, outputs) in calls:
                derivative = rule.forwards(module, inputs, outputs, derivative, tangents)
        if derivative is None:
            return trace.outputs.new_zeros((len(vectors), *trace.outputs.shape))
        return derivative

    def captures(self, trace: Trace) -> Captures:
        """Return the calls of the modules; their outputs have no place in an autograd graph."""
        return {
            module: [Call(inputs, outputs.shape, None)]
            for module, (inputs, outputs) in zip(self.modules, trace.calls(), strict=True)
        }

    def output_gradients(self, trace: Trace, derivative: Tensor) -> Gradients:
        """Return the derivatives with respect to the outputs of the modules with parameters.

        `derivative` is that with respect to the outputs of the chain.
        """
        calls = list(zip(self._rules, self.modules, trace.calls(), strict=True))
        num_layers = sum(rule.has_parameters for rule in self._rules)
        gradients: Gradients = {}
        with torch.no_grad():
            for rule, module, (inputs, outputs) in reversed(calls):
                if rule.has_parameters:
                    gradients[module] = [derivative]
                # Nothing is needed of the modules before the first with parameters.
                if len(gradients) == num_layers:
                    break
                derivative = rule.backwards(module, inputs, outputs, derivative)
        return gradients
