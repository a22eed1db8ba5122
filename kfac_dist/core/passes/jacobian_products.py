"""Products of the Jacobian of a model's outputs with vectors of parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.kernels import plain_kernels
from kfac_dist.core.passes.running_statistics import running_statistics_kept
from kfac_dist.core.vector import trainable_parameters, unflatten
from kfac_dist.errors import InvalidSpecError


class JacobianProducts:
    """Computes `J v` by one forward-mode pass for each vector, or else by two reverse passes.

    Some operations of torch have no forward mode, and some models cannot be vectorised. The first
    attempt decides.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = trainable_parameters(model)
        self._names = tuple(named)
        self._parameters = list(named.values())
        self._forward_mode = True

    def multiply(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, and the products `J v` with `vectors` [m, P], [m, *outputs.shape].

        Raises:
            InvalidSpecError: an operation of the model allows neither.
        """
        with running_statistics_kept(self._model), plain_kernels(self._model):
            if self._forward_mode:
                try:
                    return self.by_forward_mode(inputs, vectors)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, TypeError):
                    # Any of these can mean that forward mode or vmap cannot do it. An error of
                    # the model itself is raised again below.
                    self._forward_mode = False
            try:
                return self.by_reverse_mode(inputs, vectors)
            except NotImplementedError as error:
                raise InvalidSpecError(
                    "exact Fisher products need a forward-mode or a second derivative, but an "
                    f"operation of the model has neither ({error}); use step_rule: norm_constraint "
                    "with damping.adapt_period: null"
                ) from error

    def by_forward_mode(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `multiply` does, by forward mode, vectorised over the vectors."""
        primals = {
            name: parameter.detach()
            for name, parameter in zip(self._names, self._parameters, strict=True)
        }

        def forward(parameters: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = torch.func.functional_call(self._model, parameters, (inputs,))
            return outputs

        def product(vector: Tensor) -> tuple[Tensor, Tensor]:
            pieces = unflatten(vector, self._parameters)
            tangents = dict(zip(self._names, pieces, strict=True))
            result = torch.func.jvp(forward, (primals,), (tangents,))
            return result[0], result[1]

        with torch.no_grad():
            outputs, derivatives = torch.func.vmap(product)(vectors)
        return outputs[0], derivatives

    def by_reverse_mode(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `multiply` does: `J v` is the derivative of `(J^T u) . v` by u."""
        with torch.enable_grad():
            outputs = self._model(inputs)
            u = torch.zeros_like(outputs, requires_grad=True)
            gradients = torch.autograd.grad(
                outputs, self._parameters, u, create_graph=True, materialize_grads=True
            )
        # Parameters that the model does not use have a gradient that does not depend on u.
        used = [number for number, gradient in enumerate(gradients) if gradient.requires_grad]
        products = []
        for vector in vectors:
            pieces = unflatten(vector, self._parameters)
            (derivative,) = torch.autograd.grad(
                [gradients[number] for number in used],
                u,
                [pieces[number] for number in used],
                retain_graph=True,
            )
            products.append(derivative)
        return outputs.detach(), torch.stack(products)
