"""If it has the inverses, the server preconditions while the workers compute statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.whole_jobs.local_job import LocalJob, small_spec

PATIENCE_SECONDS = 1.0


class HeldBack(LocalJob):
    """A job whose first worker waits for the server to precondition before it sends statistics.

    It waits for `PATIENCE_SECONDS` at most; `ahead` has for each step whether the server did.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ahead: dict[int, bool] = {}
        self._preconditioned = threading.Event()
        sender, computer = self.workers[0]._sender, self.server._directions
        send, compute = sender.send, computer.compute

        def held_back(step: int, *arguments: Any, **more: Any) -> Any:
            self.ahead[step] = self._preconditioned.wait(PATIENCE_SECONDS)
            return send(step, *arguments, **more)

        def noted(*arguments: Any) -> Any:
            result = compute(*arguments)
            self._preconditioned.set()
            return result

        sender.send, computer.compute = held_back, noted

    def _step(self) -> Any:
        self._preconditioned.clear()
        return super()._step()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    jobs: list[HeldBack] = []

    def start(**changes: Any) -> HeldBack:
        jobs.append(HeldBack(small_spec(**changes), tmp_path))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def test_a_synchronous_run_preconditions_ahead_between_refreshes(run):
    job = run()
    job.steps(7)
    refreshed = {step for step in range(1, 8) if job.schedule.plan(step).refresh_inverses}
    assert job.ahead == {step: step not in refreshed for step in range(1, 8)}


def test_an_asynchronous_run_preconditions_ahead_after_the_first_step(run):
    job = run(staleness={"max_steps": 40})
    job.steps(6)
    assert job.ahead == {step: step > 1 for step in range(1, 7)}


def test_ekfac_never_does_because_its_inverses_need_the_moments_of_the_step(run):
    job = run(optimizer={"inverse": "ekfac"}, staleness={"max_steps": 40})
    job.steps(5)
    assert not any(job.ahead.values())
