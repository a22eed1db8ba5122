"""Lightning: a callback that preconditions before each step of the optimizer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.preconditioner import KFACPreconditioner

# Strategies that hold a whole model, with whole gradients, in every process.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy", "SingleDeviceXLAStrategy")


class KFACCallback(Callback):
    """Replaces the gradients by their directions before each step of a Lightning `Trainer`.

    Lightning clips gradients afterwards: it clips the directions. Its checkpoints have the state.

    Args:
        model: name of the attribute of the LightningModule that is the network, for example
            `"net"` if `training_step` calls `self.net(inputs)`. By default it is the
            LightningModule itself, for which `training_step` must call `self(inputs)`.
        options: those of `KFACPreconditioner`, except for `lr`, which is the first parameter
            group's. Only the parameters of the network are preconditioned.

    Attributes:
        preconditioner: made when training begins; None before that.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        if "lr" in options:
            raise InvalidSpecError("KFACCallback has no option lr: it asks the optimizer")
        self.preconditioner: KFACPreconditioner | None = None
        self._model = model
        self._options = options
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the preconditioner, with its state if training is resumed."""
        strategy = type(trainer.strategy).__name__
        if strategy not in _WHOLE:
            raise InvalidSpecError(
                f"KFACCallback: {strategy} may divide parameters or gradients among processes; "
                f"use one of {', '.join(_WHOLE)}"
            )
        if len(trainer.optimizers) != 1:
            raise InvalidSpecError(
                f"KFACCallback: the module has {len(trainer.optimizers)} optimizers; it must have "
                "one, whose gradients are those of one loss"
            )
        options = dict(self._options)
        if options.get("norm_constraint") is not None:
            optimizer = trainer.optimizers[0]
            options["lr"] = lambda: optimizer.param_groups[0]["lr"]
        self._remove()  # of an earlier training
        self.preconditioner = KFACPreconditioner(self._network(pl_module), **options)
        if self._saved is not None:
            self.preconditioner.load_state_dict(self._saved)
            self._saved = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Observe the model no longer; the preconditioner keeps its state."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Observe the model no longer, as training ends here, too."""
        self._remove()

    def _remove(self) -> None:
        if self.preconditioner is not None:
            self.preconditioner.remove()

    def _network(self, pl_module: nn.Module) -> nn.Module:
        network = pl_module if self._model is None else getattr(pl_module, self._model, None)
        if not isinstance(network, nn.Module):
            raise InvalidSpecError(
                f"KFACCallback: {type(pl_module).__name__} has no module {self._model}; model must "
                "be the name of the attribute that is the network"
            )
        return network

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Replace the gradients, which are those of all micro-batches of this step."""
        assert self.preconditioner is not None, "on_fit_start comes first"
        self.preconditioner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the preconditioner, for a checkpoint."""
        return {} if self.preconditioner is None else self.preconditioner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the preconditioner is made, or restore it."""
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict(state_dict)
        else:
            self._saved = state_dict or None
