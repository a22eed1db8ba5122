"""A driver that trains nothing: it follows a script and writes a real run folder.

It runs in its own process and reports as every driver does. The script is the `task_args` of its
job: each step takes `seconds`, and at step `end_at` it does `end` (succeed, fail, worker_dies,
no_room, die, ignore). Each step leaves a checkpoint, which is an empty folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from kfac_dist.config import parse_spec
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event, RunFolder, RunIdentity, StepRecord
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from kfac_dist.service.control.launching import read_launch, read_token
from kfac_dist.service.job_records import ReportAnswer
from kfac_dist.service.reporting.reporter import ReportClient, Reporter
from kfac_dist.service.reporting.run_reader import RunReader


class Ended(Exception):  # noqa: N818 - a state, not an error
    """The run ends in `state`."""

    def __init__(self, state: str, reason: str | None = None) -> None:
        super().__init__(state)
        self.state = state
        self.reason = reason


ordered = threading.Event()
orders: list[str] = []


def main(run_dir: Path, attempt: int) -> None:
    launch = read_launch(run_dir)
    assert launch.attempt == attempt
    script = launch.spec["task_args"]

    def obey(answer: ReportAnswer) -> None:
        if answer.order != "none" and script.get("end") != "ignore" and not ordered.is_set():
            orders.append(answer.order)
            ordered.set()

    def terminate(_number: int, _frame: FrameType | None) -> None:
        obey(ReportAnswer(order="cancel", events_known=0, steps_known=0))

    signal.signal(signal.SIGTERM, terminate)
    reader = RunReader(run_dir, launch.job, attempt)
    client = ReportClient(launch.home, read_token(run_dir))
    spec = parse_spec(launch.spec)
    identity = RunIdentity(job=launch.job, attempt=attempt)
    with Reporter(reader, client, obey):
        opened = RunFolder.resume(run_dir, spec) if launch.resume else None
        with opened or RunFolder.create(run_dir, spec, identity) as folder:
            if launch.resume:
                folder.begin_attempt(spec, identity)
            try:
                train(folder, attempt, spec.steps, script, resumed=launch.resume)
            except Ended as end:
                failure = FirstFailure(
                    role="gradient_worker", rank=1, time_seconds=1.0, log_tail="tail"
                )
                first = failure if end.state == "FAILED" else None
                folder.update_job(
                    state=end.state, reason=end.reason, message=end.reason, first_failure=first
                )


def train(
    folder: RunFolder, attempt: int, steps: int, script: dict[str, object], *, resumed: bool
) -> None:
    newest = list_checkpoints(folder.places.checkpoints)
    first = newest[0].step if newest else 0
    if resumed:
        folder.truncate_metrics_after(first)
        folder.append_event(
            Event(
                kind="resumed",
                message="Resumed.",
                step=first,
                attempt=attempt,
                details={"from_step": first},
            )
        )
    folder.update_job(state="RUNNING", step=first)
    for step in range(first + 1, steps + 1):
        if step == script.get("end_at"):
            end(str(script["end"]))
        folder.append_metrics(record(step, attempt))
        (folder.places.checkpoints / f"step-{step:08d}").mkdir()
        (folder.path / "ran").open("a").write(f"{attempt} {step}\n")
        if ordered.wait(float(str(script.get("seconds", 0.01)))):
            raise Ended("PAUSED" if orders[0] == "pause" else "CANCELLED", "interrupted")
    raise Ended("SUCCEEDED")


def end(how: str) -> None:
    if how == "fail":
        raise Ended("FAILED", "user_task")
    if how == "worker_dies":
        raise Ended("FAILED", "worker_died")
    if how in ("no_room", "preempted"):
        raise Ended("FAILED", how)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def record(step: int, attempt: int) -> StepRecord:
    return StepRecord(
        step=step,
        time=time.time(),
        loss=float(step),
        objective=float(attempt),
        num_cases=1,
        update_norm=1.0,
        step_seconds=0.01,
        parameter_version=step,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
