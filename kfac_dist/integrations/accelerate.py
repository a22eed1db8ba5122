"""Accelerate: a preconditioner that steps when gradients are complete."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.preconditioner import KFACPreconditioner

# Ways to run that hold a whole model, with whole gradients, in every process.
_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


class AcceleratedPreconditioner:
    """Preconditions in a loop of Accelerate, between `accelerator.backward` and `optimizer.step`.

    Args:
        accelerator: the accelerator that has prepared the model.
        preconditioner: the preconditioner of this model, prepared or not.
        optimizer: the prepared optimizer. If gradients are scaled (fp16) and there is a
            `norm_constraint`, they are unscaled before each step; do not clip them then.

    Raises:
        InvalidSpecError: the model is divided among processes.
    """

    def __init__(
        self, accelerator: Accelerator, preconditioner: KFACPreconditioner, optimizer: Any
    ) -> None:
        kind = accelerator.distributed_type.value
        if kind not in _WHOLE:
            raise InvalidSpecError(
                f"kfac_dist.integrations: Accelerate runs as {kind}, which divides the model among "
                f"processes; K-FAC needs whole layers: {', '.join(_WHOLE)}"
            )
        self.preconditioner = preconditioner
        self._accelerator = accelerator
        self._optimizer = optimizer

    def step(self) -> None:
        """Replace the gradients by their directions, unless more micro-batches will be added."""
        if not self._accelerator.sync_gradients:
            return
        if self.preconditioner.norm_constraint is not None:
            self._accelerator.unscale_gradients(self._optimizer)
        self.preconditioner.step()
