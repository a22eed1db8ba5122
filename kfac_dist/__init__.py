"""kfac_dist: distributed training of neural networks with K-FAC.

Public names are imported on first use, so that the command line can start without torch and Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kfac_dist._version import __version__

if TYPE_CHECKING:
    from kfac_dist.optim.model_calls import ModelCalls
    from kfac_dist.optim.optimizer import KFAC
    from kfac_dist.optim.preconditioner import KFACPreconditioner
    from kfac_dist.optim.step_result import StepResult
    from kfac_dist.service.client import Client
    from workers.api import train

_MODULES = {
    "Client": "kfac_dist.service.client",
    "KFAC": "kfac_dist.optim.optimizer",
    "KFACPreconditioner": "kfac_dist.optim.preconditioner",
    "ModelCalls": "kfac_dist.optim.model_calls",
    "StepResult": "kfac_dist.optim.step_result",
    "train": "workers.api",
}

__all__ = [
    "KFAC",
    "Client",
    "KFACPreconditioner",
    "ModelCalls",
    "StepResult",
    "__version__",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
