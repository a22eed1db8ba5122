"""Do the observed calls of a layer explain the whole gradient of its parameters?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.core.statistics.site_sums import ObservedGradient, SiteSums
from kfac_dist.core.vector import flatten, is_finite, trainable_parameters
from kfac_dist.errors import InvalidSpecError

# What rounding may do, relative to the terms of the sum. A model may compute in bfloat16 itself.
_TOLERANCE = {torch.float32: 2e-2, torch.float64: 1e-6}


def check_observed(
    model: nn.Module, outputs: Tensor, derivative: Tensor, sites: Sequence[SiteSums]
) -> None:
    """Check that the gradients of all layers are the sums that their observed calls give.

    The factors of a layer would miss what else the model does with its parameters.

    Args:
        model: the model.
        outputs: its outputs, with their autograd graph.
        derivative: the derivative with respect to these that `sites` had last.
        sites: the sums of all sites.

    Raises:
        InvalidSpecError: a gradient differs.
    """
    parameters = trainable_parameters(model)
    gradients = torch.autograd.grad(
        outputs,
        list(parameters.values()),
        derivative,
        retain_graph=True,
        materialize_grads=True,
    )
    vector = flatten([g.to_dense() if g.is_sparse else g for g in gradients])
    if not is_finite(vector):
        return  # the statistics will be refused
    differing = [
        sums.site.parameters[0]
        for sums in sites
        if not _has_gradient_of_its_own(sums, parameters) and _differs(sums, vector)
    ]
    if differing:
        names = ", ".join(dict.fromkeys(differing))
        raise InvalidSpecError(
            f"the gradient of {names} is more than the observed calls of its module give: the "
            "model also uses it without calling the module (as in x @ layer.weight.T), or "
            "differentiates through the module in its forward pass, or a hook changes what the "
            f"module returns. Ask for a diagonal block with diagonal: [{names}]"
        )


def _has_gradient_of_its_own(sums: SiteSums, parameters: dict[str, nn.Parameter]) -> bool:
    """Return whether the gradient is not the derivative, because something rescales it."""
    hooked = any(parameters[name]._backward_hooks for name in sums.site.parameters)
    return hooked or any(getattr(m, "scale_grad_by_freq", False) for m in sums.site.modules)


def _differs(sums: SiteSums, gradient: Tensor) -> bool:
    observed = sums.observed_gradient()
    if observed is None:
        return False
    expected, scale = observed
    size = torch.linalg.vector_norm(expected)
    tolerance = _TOLERANCE[expected.dtype] * float(torch.maximum(scale, size))
    difference = sum(float(part.square().sum()) for part in _differences(sums, observed, gradient))
    return difference > tolerance**2


def _differences(sums: SiteSums, observed: ObservedGradient, gradient: Tensor) -> Iterator[Tensor]:
    first = sums.site.first_row
    for block in sums.site.blocks:
        rows = slice(block.rows[0] - first, block.rows[1] - first)
        yield block.matrix(gradient) - observed.matrix[rows, slice(*block.columns)]
