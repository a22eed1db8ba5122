"""Whole jobs on the tests' Ray cluster, through `run_job`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kfac_dist.config import JobSpec
from kfac_dist.runs import Event, JobSummary, RunFolder, StepRecord

TASK = '''\
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Line:
    """Fits a linear map; `breaks_after` forward passes later the model does what `how` says."""

    distribution = "gaussian"

    def __init__(self, depth=1, normalised=False, breaks_after=0, how="raise"):
        self.depth = depth
        self.normalised = normalised
        self.breaks_after = breaks_after
        self.how = how

    def model(self):
        print("building the model")
        model = Breaking(self.depth, self.breaks_after, self.how)
        return nn.Sequential(nn.BatchNorm1d(6), model) if self.normalised else model

    def train_data(self, data_dir):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(64, 6, generator=generator)
        return TensorDataset(inputs, inputs @ torch.randn(6, 3, generator=generator))

    def test_data(self, data_dir):
        return self.train_data(data_dir)


class Breaking(nn.Module):
    def __init__(self, depth, breaks_after, how):
        super().__init__()
        widths = [6, *range(4 + depth, 4, -1)]
        pairs = zip(widths, widths[1:])
        self.hidden = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairs)
        self.output = nn.Linear(5, 3)
        self.breaks_after = breaks_after
        self.how = how
        self.passes = 0

    def forward(self, inputs):
        self.passes += 1
        for layer in self.hidden:
            inputs = torch.tanh(layer(inputs))
        outputs = self.output(inputs)
        if self.breaks_after and self.passes > self.breaks_after:
            if self.how == "nan":
                return outputs * float("nan")
            if self.how == "hang":
                time.sleep(1000)
            raise LookupError("no such column")
        return outputs
'''


def line_spec(**changes: Any) -> dict[str, Any]:
    """A job on a user's own task whose steps take milliseconds."""
    spec: dict[str, Any] = {
        "name": "line",
        "task": "line.py:Line",
        "data": {"name": None},
        "steps": 12,
        "batch_size": 20,
        "dtype": "float64",
        "optimizer": {
            "damping": {"initial": 1.0},
            "inverse_update_period": 4,
            "statistics_fraction": 1.0,
            "fisher_fraction": 1.0,
        },
        "staleness": {"max_steps": 0},
        "checkpoint": {"every_steps": 4},
    }
    return spec | changes


@dataclass
class Jobs:
    """Runs jobs in a folder and keeps their records and events."""

    folder: Path
    records: list[StepRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    on_step: Callable[[StepRecord], None] = lambda record: None

    def __post_init__(self) -> None:
        (self.folder / "line.py").write_text(TASK)

    def run(
        self, spec: JobSpec, *, run_dir: str = "run", resume: bool = False, **options: Any
    ) -> JobSummary:
        from workers.driver.launch import run_job

        return run_job(
            spec,
            base_dir=self.folder,
            data_dir=None,
            home=self.folder / "home",
            run_dir=self.folder / run_dir,
            resume=resume,
            on_record=self._record,
            on_event=self.events.append,
            **options,
        )

    def _record(self, record: StepRecord) -> None:
        self.records.append(record)
        self.on_step(record)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def event(self, kind: str) -> Event:
        return next(event for event in self.events if event.kind == kind)

    def run_folder(self, run_dir: str = "run") -> RunFolder:
        return RunFolder.open(self.folder / run_dir)

    def checkpoint(self, step: int, run_dir: str = "run") -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.run_folder(run_dir).places.checkpoints / f"step-{step:08d}"

    def pid(self, role: str, run_dir: str = "run") -> int:
        """Return the process id of the newest actor of this role with rank 0."""
        log = self.run_folder(run_dir).places.log(role, 0)
        return json.loads(log.read_text().splitlines()[-1])["pid"]


def actors_alive() -> list[str]:
    """Return the titles of the actors in this process's cluster."""
    titles = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = "".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith(("ray::Gradient", "ray::Inverse", "ray::Parameter")):
            titles.append(title)
    return titles
