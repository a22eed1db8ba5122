"""What goes into a checkpoint, from whom, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kfac_dist.coordination.steps.sampling import SamplerCursor
from kfac_dist.errors import InvalidSpecError, JobFailedError
from kfac_dist.runs import RunFolder
from workers.checkpoint import LoadedCheckpoint, load_newest, write_checkpoint
from workers.driver.crew.crew import SERVER_ROLE, Crew
from workers.exchange.arrays import Array

FACTORS_ROLE = "factors"
_BUFFERS_ROLE = "buffers"


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a job goes on: after `step`, with the state of its actors; step 0 is the beginning.

    Factors are kept by layer, so any number of inverse workers can take them over; buffers of the
    model are the same for all gradient workers; all else is the parameter server's. `refused` has
    a message for each checkpoint that was not whole.
    """

    step: int
    cursor: SamplerCursor
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    refused: tuple[str, ...]


BEGINNING = ResumePoint(
    step=0,
    cursor=SamplerCursor(epoch=0, offset=0),
    server_snapshot=None,
    averages={},
    buffers={},
    refused=(),
)


def find_resume_point(folder: RunFolder, last_step: int) -> ResumePoint:
    """Return where the run in `folder` goes on; the beginning when it has no checkpoint.

    At `last_step` itself there is nothing left to do but to evaluate.

    Raises:
        NotFoundError: there are checkpoints, but none is whole.
        InvalidSpecError: the newest whole one is of a later step than `last_step`.
    """
    loaded = load_newest(folder.places.checkpoints)
    if loaded is None:
        return BEGINNING
    if loaded.step > last_step:
        raise InvalidSpecError(
            f"steps: {last_step} is below the step of the newest checkpoint, {loaded.step} "
            f"({loaded.path}), and a run does not go back; use at least {loaded.step}, or start a "
            "new run with --run-dir"
        )
    return _resume_point(loaded)


def _resume_point(loaded: LoadedCheckpoint) -> ResumePoint:
    cursor = loaded.state["sampler"]
    return ResumePoint(
        step=loaded.step,
        cursor=SamplerCursor(epoch=cursor["epoch"], offset=cursor["offset"]),
        server_snapshot=loaded.roles[SERVER_ROLE],
        averages=loaded.roles.get(FACTORS_ROLE, {}),
        buffers=loaded.roles.get(_BUFFERS_ROLE, {}),
        refused=loaded.refused,
    )


def save(
    folder: RunFolder, crew: Crew, *, statistics_step: int, cursor: SamplerCursor, keep: int
) -> int:
    """Write a checkpoint of the step that the crew has just done.

    The factors are those with the statistics of `statistics_step` in them. Returns how many
    inverse workers gave none, because they died, are only starting, or did not answer in time:
    their layers are as the last checkpoint had them.

    Raises:
        JobFailedError: the mirrors of the parameters are not all the same, or the disk is full.
    """
    _check_mirrors(crew)
    timeout = crew.group_timeout_seconds
    asked = crew.inverse_pool.snapshots(statistics_step, timeout)
    parts = crew.gather_optional(asked)
    averages: dict[str, Array] = {}
    for part in parts:
        averages |= part
    averages = crew.inverse_pool.keep_snapshot(averages)
    (server,) = crew.gather(crew.call_server("snapshot"))
    roles: dict[str, Mapping[str, Array]] = {SERVER_ROLE: server}
    if averages:
        roles[FACTORS_ROLE] = averages
    if buffers := crew.share_buffers():
        roles[_BUFFERS_ROLE] = buffers
    state = {"sampler": {"epoch": cursor.epoch, "offset": cursor.offset}}
    write_checkpoint(folder.places.checkpoints, crew.step, roles, state, keep)
    return crew.inverse_pool.num_starting + len(asked) - len(parts)


def _check_mirrors(crew: Crew) -> None:
    calls = crew.call_server("checksum") | crew.call_workers("checksum")
    server, *workers = crew.gather(calls)
    diverged = [rank for rank, word in enumerate(workers) if word != server]
    if diverged:
        raise JobFailedError(
            f"the parameters of gradient workers {', '.join(map(str, diverged))} are not those of "
            f"the parameter server at step {crew.step}",
            reason="diverged_mirrors",
        )


def averages_step(averages: Mapping[str, Array]) -> int:
    """Return the step of the newest statistics in saved averages, 0 when there are none."""
    steps = [int(np.asarray(v)) for name, v in averages.items() if name.endswith(":step")]
    return max(steps, default=0)
