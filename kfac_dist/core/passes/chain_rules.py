"""How derivatives pass through the modules that a chain may consist of, forwards and backwards.

One rule for each family of modules, one row of `CHAIN_RULES` for each type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Tangents = Mapping[Tensor, Tensor]


class ChainRule(ABC, Generic[M]):
    """The rule for one family of modules, at the `inputs` and `outputs` of a pass, [N, ...]."""

    has_parameters: ClassVar[bool] = False

    @abstractmethod
    def forwards(
        self,
        module: M,
        inputs: Tensor,
        outputs: Tensor,
        before: Tensor | None,
        tangents: Sequence[Tangents],
    ) -> Tensor | None:
        """Return the derivatives of the outputs in m directions, [m, *outputs.shape].

        `before` [m, *inputs.shape] has the derivatives of the inputs and may be overwritten;
        `tangents` have the change of each parameter in each direction. None is zero, for `before`
        and for the result.
        """

    @abstractmethod
    def backwards(self, module: M, inputs: Tensor, outputs: Tensor, after: Tensor) -> Tensor:
        """Return a derivative with respect to the inputs, from that of the outputs."""


class LinearChainRule(ChainRule[nn.Linear]):
    """Linear layers: the only modules of a chain with parameters."""

    has_parameters = True

    def forwards(
        self,
        module: nn.Linear,
        inputs: Tensor,
        outputs: Tensor,
        before: Tensor | None,
        tangents: Sequence[Tangents],
    ) -> Tensor:
        """Return `x dW^T + db + dx W^T`."""
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

    def backwards(
        self, module: nn.Linear, inputs: Tensor, outputs: Tensor, after: Tensor
    ) -> Tensor:
        """Return `g W`."""
        return after @ module.weight


class FlattenChainRule(ChainRule[nn.Flatten]):
    """Flattening changes the shape of derivatives as it does that of activities."""

    def forwards(
        self,
        module: nn.Flatten,
        inputs: Tensor,
        outputs: Tensor,
        before: Tensor | None,
        tangents: Sequence[Tangents],
    ) -> Tensor | None:
        """Flatten the derivative in each direction."""
        return None if before is None else torch.stack([module(part) for part in before])

    def backwards(
        self, module: nn.Flatten, inputs: Tensor, outputs: Tensor, after: Tensor
    ) -> Tensor:
        """Give the derivative the shape of the inputs."""
        return after.reshape(inputs.shape)


class ElementwiseChainRule(ChainRule[nn.Module]):
    """Elementwise modules multiply derivatives by their slope, `slope(module, inputs, outputs)`."""

    def __init__(self, slope: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        self._slope = slope

    def forwards(
        self,
        module: nn.Module,
        inputs: Tensor,
        outputs: Tensor,
        before: Tensor | None,
        tangents: Sequence[Tangents],
    ) -> Tensor | None:
        """Multiply in place."""
        return None if before is None else before.mul_(self._slope(module, inputs, outputs))

    def backwards(
        self, module: nn.Module, inputs: Tensor, outputs: Tensor, after: Tensor
    ) -> Tensor:
        """Multiply into a new tensor."""
        return after * self._slope(module, inputs, outputs)


# Where the outputs give the slope, they are used: a transcendental function of the inputs costs as
# much as ten products.
def _tanh_slope(_module: nn.Module, _inputs: Tensor, outputs: Tensor) -> Tensor:
    return torch.addcmul(outputs.new_ones(()), outputs, outputs, value=-1)


def _sigmoid_slope(_module: nn.Module, _inputs: Tensor, outputs: Tensor) -> Tensor:
    return torch.addcmul(outputs, outputs, outputs, value=-1)


def _relu_slope(_module: nn.Module, _inputs: Tensor, outputs: Tensor) -> Tensor:
    return (outputs > 0).to(outputs.dtype)


def _slope_by_autograd(module: nn.Module, inputs: Tensor, _outputs: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(module(leaf).sum(), leaf)
    return derivative


CHAIN_RULES: dict[type[nn.Module], ChainRule[Any]] = {
    nn.Linear: LinearChainRule(),
    nn.Flatten: FlattenChainRule(),
    nn.Tanh: ElementwiseChainRule(_tanh_slope),
    nn.Sigmoid: ElementwiseChainRule(_sigmoid_slope),
    nn.ReLU: ElementwiseChainRule(_relu_slope),
    nn.GELU: ElementwiseChainRule(_slope_by_autograd),
    nn.SiLU: ElementwiseChainRule(_slope_by_autograd),
    nn.Softplus: ElementwiseChainRule(_slope_by_autograd),
    nn.ELU: ElementwiseChainRule(_slope_by_autograd),
}
