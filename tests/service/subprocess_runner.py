"""A JobRunner without a cluster: each attempt is a real process on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import AttemptKey, Remnant, RunnerState, RunnerStatus
from kfac_dist.errors import UnreachableError
from tests.paths import ROOT

_SCRIPT = Path(__file__).with_name("scripted_driver.py")


class SubprocessRunner:
    """Runs `scripted_driver.py`; attributes make it fail in the ways of real clusters."""

    def __init__(self, num_cpus: int = 4) -> None:
        self.num_cpus = num_cpus
        self.processes: dict[AttemptKey, subprocess.Popen[bytes]] = {}
        self.submitted: list[AttemptKey] = []
        self.is_away = False
        self.keeps_pending = False
        self.forgets = False

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        self._check()
        if key in self.submitted:
            return
        self.submitted.append(key)
        if self.keeps_pending:
            return
        with (run_dir / "driver.out").open("ab") as out:
            self.processes[key] = subprocess.Popen(
                [sys.executable, str(_SCRIPT), str(run_dir), str(key.attempt)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def stop(self, key: AttemptKey) -> None:
        self._check()
        self._signal(key, signal.SIGTERM)

    def kill(self, key: AttemptKey) -> None:
        self._check()
        self._signal(key, signal.SIGKILL)

    def _signal(self, key: AttemptKey, number: signal.Signals) -> None:
        if key in self.processes:
            self.processes[key].send_signal(number)
        elif number is signal.SIGKILL and key in self.submitted:
            self.submitted.remove(key)

    def status(self, key: AttemptKey) -> RunnerStatus:
        self._check()
        if key not in self.submitted or self.forgets:
            return RunnerStatus(state=RunnerState.UNKNOWN)
        if key not in self.processes:
            return RunnerStatus(state=RunnerState.PENDING)
        code = self.processes[key].poll()
        if code is None:
            return RunnerStatus(state=RunnerState.RUNNING)
        state = RunnerState.FAILED if code else RunnerState.SUCCEEDED
        return RunnerStatus(state=state, message=f"exit code {code}")

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        return {key: self.status(key) for key in self.submitted}

    def resources(self) -> Room:
        self._check()
        return Room(num_cpus=self.num_cpus, num_gpus=0, num_inverse_slots=4)

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        self._check()
        process = self.processes.get(key)
        if process is None or process.poll() is not None:
            return []
        return [Remnant(description=f"process {process.pid}")]

    def _check(self) -> None:
        if self.is_away:
            raise UnreachableError("the cluster is away")

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
