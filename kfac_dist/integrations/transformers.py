"""Hugging Face transformers: a preconditioner for a model, and a callback for its `Trainer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from kfac_dist.errors import InvalidSpecError
from kfac_dist.integrations.heads import head_of
from kfac_dist.optim.observer import plain_module
from kfac_dist.optim.preconditioner import KFACPreconditioner

STATE_FILE = "kfac.pt"


def preconditioner_for(model: nn.Module, **options: Any) -> KFACPreconditioner:
    """Return a preconditioner for a model of transformers, or one with adapters of peft.

    The class of the model says what its logits predict: its distribution, and whether a position
    predicts its own label or the next. Labels may be in the call. Then positions whose label is
    -100 are left out, and so is padding that `attention_mask` shows, which must be on the right.

    Args:
        model: the model, whose name ends with the head that it has.
        options: those of `KFACPreconditioner`; `distribution` and `calls` replace what the class
            says.

    Raises:
        InvalidSpecError: the head is not known, or an option is wrong.
    """
    if "distribution" not in options or "calls" not in options:
        head = head_of(_base(plain_module(model)))
        options = {"distribution": head.distribution, "calls": head.calls} | options
        if options["distribution"] == "categorical":
            options = {"class_axis": -1} | options
    return KFACPreconditioner(model, **options)


def _base(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper of peft."""
    inner = getattr(model, "get_base_model", None)
    if inner is None:
        return model
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise InvalidSpecError(
                f"kfac_dist.integrations: adapter {name} of {type(model).__name__} adds positions "
                "to the inputs, which labels and masks of a call do not have; use LoRA"
            )
        if getattr(config, "use_dora", False):
            raise InvalidSpecError(
                f"kfac_dist.integrations: adapter {name} of {type(model).__name__} uses DoRA, "
                "which calls its layers on an identity matrix, too; K-FAC would count its rows as "
                "cases. Use LoRA without use_dora"
            )
    base: nn.Module = inner()
    return base


class KFACTrainerCallback(TrainerCallback):
    """Replaces the gradients by their directions before each step of a `Trainer`.

    Its state is saved in the Trainer's checkpoints, as `kfac.pt`, and restored from them.

    The Trainer clips gradients before they get here, unless `max_grad_norm` is 0. A direction is
    linear in the gradient, so clipping makes it shorter.

    Args:
        options: those of `KFACPreconditioner`, except for `lr`, which is the first parameter
            group's.

    Attributes:
        preconditioner: made when training begins; None before that.
    """

    def __init__(self, **options: Any) -> None:
        if "lr" in options:
            raise InvalidSpecError("KFACTrainerCallback has no option lr: it asks the optimizer")
        self.preconditioner: KFACPreconditioner | None = None
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the preconditioner, with its state if training is resumed."""
        options = dict(self._options)
        if options.get("norm_constraint") is not None:
            if args.fp16 and not args.max_grad_norm:
                raise InvalidSpecError(
                    "KFACTrainerCallback: with fp16 and max_grad_norm = 0, the Trainer leaves "
                    "gradients scaled, and norm_constraint would bound the scaled step; set "
                    "max_grad_norm, or bf16 instead of fp16"
                )
            optimizer = kwargs["optimizer"]
            options["lr"] = lambda: optimizer.param_groups[0]["lr"]
        self._remove()  # of an earlier training
        self.preconditioner = preconditioner_for(kwargs["model"], **options)
        if state.global_step > 0:
            self._restore(args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the model no longer; the preconditioner keeps its state."""
        self._remove()

    def _remove(self) -> None:
        if self.preconditioner is not None:
            self.preconditioner.remove()

    def _restore(self, args: Any, step: int) -> None:
        assert self.preconditioner is not None
        given = getattr(args, "resume_from_checkpoint", None)
        folders = [Path(given)] if isinstance(given, str) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{step}")
        for folder in folders:
            if (folder / STATE_FILE).exists():
                saved = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
                self.preconditioner.load_state_dict(saved)
                return
        warnings.warn(
            f"KFACTrainerCallback: training resumes at step {step}, but {folders[0]} has no "
            f"{STATE_FILE}; the factors start again from nothing",
            stacklevel=2,
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace the gradients, which are those of all micro-batches of this step."""
        assert self.preconditioner is not None, "on_train_begin comes first"
        self.preconditioner.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state beside the Trainer's own."""
        if self.preconditioner is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.preconditioner.state_dict(), folder / STATE_FILE)
