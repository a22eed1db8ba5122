"""A distributed job whose turns alternate with those of a baseline.

The job runs on the project's workers. Between two of its turns all its processes are idle, and the
driver does a turn of the baseline on the same batches. A machine that slows down then slows both.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from processes import cpu_seconds_by_role
from race import ROOT

from kfac_dist._home import default_home
from kfac_dist.config import JobSpec
from kfac_dist.runs import StepRecord
from workers.driver.launch import run_job

SETTLE_SECONDS = 0.5  # an inverse worker may still be busy after the last step of a turn
WITHOUT_EXTRAS = ("checkpoint.every_steps=null", "evaluation.every_steps=null")

TakeTurn = Callable[[range], None]


@contextmanager
def on_cores(cores: Set[int]) -> Iterator[None]:
    """Run this process, and those it starts inside the block, only on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Turns:
    """Measures the steps of a job from step `first` on: records, wall seconds, CPU by role.

    A turn ends with step `first + k * steps_a_turn - 1`. Then `between` is called with the steps of
    the turn, for the baseline to do the same ones.
    """

    first: int
    steps_a_turn: int
    between: TakeTurn | None = None
    records: list[StepRecord] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: Counter[str] = field(default_factory=Counter)
    _last: float = 0.0
    _cpu_before: Counter[str] = field(default_factory=Counter)

    def on_record(self, record: StepRecord) -> None:
        """Note a step; the driver calls this right after it."""
        now = time.perf_counter()
        if record.step >= self.first:
            self.records.append(record)
            self.seconds.append(now - self._last)
        done = record.step + 1 - self.first
        if done % self.steps_a_turn == 0 and done >= 0:
            self._end_turn(range(max(1, record.step + 1 - self.steps_a_turn), record.step + 1))
        self._last = time.perf_counter()

    def _end_turn(self, steps: range) -> None:
        time.sleep(SETTLE_SECONDS)
        if steps.start >= self.first:
            now = cpu_seconds_by_role()
            now.subtract(self._cpu_before)
            self.cpu_seconds.update(now)
        if self.between is not None:
            self.between(steps)
        self._cpu_before = cpu_seconds_by_role()

    @property
    def step_seconds(self) -> float:
        """Mean wall seconds of a step over all turns."""
        return mean(self.seconds)

    def phase_seconds(self) -> dict[str, float]:
        """Return the mean seconds of each phase of a step."""
        phases = dict.fromkeys(self.records[0].phase_seconds)
        return {p: mean(r.phase_seconds[p] for r in self.records) for p in phases}


def run_turns(spec: JobSpec, data_dir: Path | None, turns: Turns) -> None:
    """Run the job `spec` to its end, in a run folder that is then deleted."""
    with tempfile.TemporaryDirectory() as folder:
        run_job(
            spec,
            base_dir=ROOT / "examples",
            data_dir=data_dir and data_dir.absolute(),
            home=default_home(),
            run_dir=Path(folder) / "run",
            resume=False,
            on_record=turns.on_record,
        )
