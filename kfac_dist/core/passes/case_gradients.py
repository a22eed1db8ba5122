"""Gradients of single cases, for parameters that no layer rule covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.kernels import plain_kernels

# Elements of the per-case gradients held at a time.
_CHUNK_ELEMENTS = 1 << 22

Squares = dict[str, Tensor]


class CaseGradients:
    """Sums over cases of the squared gradients of some parameters of a model.

    The passes over single cases are vectorised if the model permits it, and otherwise run one
    after the other. The first attempt decides.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self._model = model
        self._parameters = {name: parameters[name] for name in names}
        self._vectorised = True

    def squares(self, inputs: Tensor, derivatives: Tensor) -> Squares:
        """Return the sums by name of the parameter, shaped like it.

        `derivatives` [N, ...] are those of the loss of each case with respect to the outputs of
        the model for `inputs` [N, ...].
        """
        if not self._vectorised:
            return self._one_by_one(inputs, derivatives)
        try:
            return self._in_chunks(inputs, derivatives)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError):
            # vmap refuses what it cannot do (control flow on values, in-place changes) with any
            # of these. An error of the model itself is raised again below.
            self._vectorised = False
            return self._one_by_one(inputs, derivatives)

    def _in_chunks(self, inputs: Tensor, derivatives: Tensor) -> Squares:
        detached = {name: p.detach() for name, p in self._parameters.items()}

        def gradient(case: Tensor, derivative: Tensor) -> dict[str, Tensor]:
            def outputs_of(parameters: dict[str, Tensor]) -> Tensor:
                outputs: Tensor = torch.func.functional_call(
                    self._model, parameters, (case.unsqueeze(0),)
                )
                return outputs

            product: Any = torch.func.vjp(outputs_of, detached)[1]
            gradients: dict[str, Tensor] = product(derivative.unsqueeze(0))[0]
            return gradients

        per_case = torch.func.vmap(gradient, randomness="different")
        # Without no_grad, the other parameters would give the sums a graph that averages keep.
        with torch.no_grad(), plain_kernels(self._model):
            return self._sums(per_case, inputs, derivatives)

    def _sums(
        self,
        per_case: Callable[[Tensor, Tensor], dict[str, Tensor]],
        inputs: Tensor,
        derivatives: Tensor,
    ) -> Squares:
        size = max(1, _CHUNK_ELEMENTS // sum(p.numel() for p in self._parameters.values()))
        sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            for name, gradients in per_case(inputs[part], derivatives[part]).items():
                sums[name] += gradients.square().sum(dim=0)
        return sums

    def _one_by_one(self, inputs: Tensor, derivatives: Tensor) -> Squares:
        parameters = list(self._parameters.values())
        sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        for case, derivative in zip(
            torch.split(inputs, 1), torch.split(derivatives, 1), strict=True
        ):
            with torch.enable_grad():
                outputs = self._model(case)
            gradients = torch.autograd.grad(outputs, parameters, derivative, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.to_dense().square() if gradient.is_sparse else gradient.square()
        return sums
