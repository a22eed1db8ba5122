"""Job specifications of the task tests, and user tasks written to disk."""

from __future__ import annotations

import textwrap
from pathlib import Path

from kfac_dist.config import JobSpec


def spec(task: str = "autoencoder", **keys: object) -> JobSpec:
    """A specification with `task` and the given top-level keys."""
    return JobSpec.model_validate(
        {"name": "test", "task": task, "steps": 1, "batch_size": 1, **keys}
    )


USER_TASK = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset


    class Line:
        distribution = "gaussian"

        def __init__(self, num_cases=12, slope=2.0):
            self.num_cases = num_cases
            self.slope = slope

        def model(self):
            return nn.Linear(1, 1)

        def train_data(self, data_dir):
            x = torch.linspace(0, 1, self.num_cases)[:, None]
            return TensorDataset(x, self.slope * x)

        def test_data(self, data_dir):
            return self.train_data(data_dir)
"""


def write_task(
    folder: Path, *changes: tuple[str, str], name: str = "mine.py", more: str = ""
) -> None:
    """Write the user task and `more` into `folder` after replacing text, each there once."""
    source = textwrap.dedent(USER_TASK)
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + more)
