"""kfac_dist: distributed training of neural networks with K-FAC.

The public names are loaded on first use, so that importing a light part, such as the command
line, does not load torch or Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kfac_dist._version import __version__

if TYPE_CHECKING:
    from kfac_dist.optim.optimizer import KFAC
    from kfac_dist.optim.preconditioner import KFACPreconditioner
    from kfac_dist.optim.step_result import StepResult
    from kfac_dist.service.client import Client
    from workers.api import train

_HOMES = {
    "Client": "kfac_dist.service.client",
    "KFAC": "kfac_dist.optim.optimizer",
    "KFACPreconditioner": "kfac_dist.optim.preconditioner",
    "StepResult": "kfac_dist.optim.step_result",
    "train": "workers.api",
}

__all__ = ["KFAC", "Client", "KFACPreconditioner", "StepResult", "__version__", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
