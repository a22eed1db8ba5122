"""How a run ends whose node is lost: one of the processes that are Ray itself has died."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import RayError

from kfac_dist.errors import JobFailedError
from kfac_dist.runs import ENDED, Event, RunFolder

_REASON = "node_lost"
_MESSAGE = (
    "the node is lost: {daemon}, a process that Ray cannot do without, died at step {step}, and "
    "the workers with it. The usual cause is memory; --resume continues from the newest "
    "checkpoint"
)
_STOPPED_MESSAGE = (
    "the node is lost: {daemon}, a process that Ray cannot do without, was stopped (as by SIGSTOP) "
    "and still was after faults.stall_seconds, {seconds:g}, at step {step}; --resume continues "
    "from the newest checkpoint"
)
_RAYLET = "raylet"


def lost_node_error(daemon: str, step: int) -> JobFailedError:
    """Return the error of a job whose driver has found out that `daemon` is dead."""
    return JobFailedError(_MESSAGE.format(daemon=daemon, step=step), reason=_REASON)


def stopped_daemon_error(daemon: str, step: int, stall_seconds: float) -> JobFailedError:
    """Return the error of a job whose driver has found out that `daemon` is stopped."""
    message = _STOPPED_MESSAGE.format(daemon=daemon, step=step, seconds=stall_seconds)
    return JobFailedError(message, reason=_REASON)


@contextmanager
def ray_errors_end_the_job() -> Iterator[None]:
    """Turn an error of Ray itself inside the block into the failure of the job.

    Raises:
        JobFailedError: Ray failed; errors of the job's own processes do not come here.
    """
    try:
        yield
    except RayError as error:
        cause = " ".join(str(error).split())
        raise JobFailedError(
            f"Ray failed under the job: {type(error).__name__}: {cause}", reason=_REASON
        ) from error


def record_lost(run_dir: Path) -> None:
    """Record the end of a run whose driver Ray has ended because its raylet had died.

    Writes one line to stderr. A run that has ended by itself is left as it is.
    """
    folder = RunFolder.open(run_dir)
    job = folder.read_job()
    if job.state in ENDED and job.state != "INTERRUPTED":
        return
    message = lost_node_error(_RAYLET, job.step).message
    event = Event(
        kind="failed", message=message, step=job.step, severity="error", attempt=job.attempt
    )
    folder.append_event(event)
    folder.close()
    folder.update_job(state="FAILED", step=job.step, reason=_REASON, message=message)
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
