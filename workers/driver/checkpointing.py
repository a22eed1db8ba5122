"""What a checkpoint of a job contains, who provides each part, and how a run resumes from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kfac_dist.coordination.steps.sampling import SamplerCursor
from kfac_dist.errors import InvalidSpecError, JobFailedError
from kfac_dist.runs import RunFolder
from workers.checkpoint import LoadedCheckpoint, load_newest
from workers.driver.checkpoint_writer import CheckpointContent
from workers.driver.crew.crew import Crew
from workers.driver.crew.inverse.kept_averages import unpack_averages
from workers.driver.crew.processes import SERVER_ROLE
from workers.exchange.arrays import Array

FACTORS_ROLE = "factors"
_BUFFERS_ROLE = "buffers"
_WITHOUT_FACTORS = "without_factors"  # in the state of a checkpoint that has none for a reason


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run resumes: after `step`, with this state; step 0 is the start of training.

    Factors are stored by layer, so any number of inverse workers can load them. The buffers of the
    model are the same on all gradient workers. Everything else belongs to the parameter server.
    `refused` has a message for each newer checkpoint that is damaged.
    """

    step: int
    cursor: SamplerCursor
    server_snapshot: Mapping[str, Array] | None
    averages: Mapping[str, Array]
    buffers: Mapping[str, Array]
    refused: tuple[str, ...]

    @property
    def statistics_step(self) -> int:
        """The step of the newest statistics in `averages`, 0 without averages."""
        steps = [int(np.asarray(v)) for name, v in self.averages.items() if name.endswith(":step")]
        return max(steps, default=0)


START = ResumePoint(
    step=0,
    cursor=SamplerCursor(epoch=0, offset=0),
    server_snapshot=None,
    averages={},
    buffers={},
    refused=(),
)


def find_resume_point(
    folder: RunFolder, last_step: int, *, has_factors: bool, has_buffers: bool
) -> ResumePoint:
    """Return where the run in `folder` resumes; `START` when it has no checkpoint.

    A checkpoint of `last_step` itself is accepted: then only the evaluation is left to do. A
    checkpoint without a part that the run needs is refused like a damaged one.

    Raises:
        NotFoundError: all checkpoints are damaged.
        InvalidSpecError: the newest whole checkpoint is of a later step than `last_step`.
    """
    needed = {
        SERVER_ROLE: True,
        FACTORS_ROLE: has_factors,
        _BUFFERS_ROLE: has_buffers,
    }
    roles = [role for role, is_needed in needed.items() if is_needed]
    loaded = load_newest(
        folder.places.checkpoints, lacks=lambda loaded: _missing_part(loaded, roles)
    )
    if loaded is None:
        return START
    if loaded.step > last_step:
        raise InvalidSpecError(
            f"steps: {last_step} is below the step of the newest checkpoint, {loaded.step} "
            f"({loaded.path}), and a run cannot go back; use at least {loaded.step}, or start a "
            "new run with --run-dir"
        )
    return _resume_point(loaded)


def _missing_part(loaded: LoadedCheckpoint, roles: Sequence[str]) -> str | None:
    for role in roles:
        excused = role == FACTORS_ROLE and loaded.state.get(_WITHOUT_FACTORS)
        if role not in loaded.roles and not excused:
            return f"role {role}"
    sampler = loaded.state.get("sampler")
    if not isinstance(sampler, dict) or not all(
        isinstance(sampler.get(key), int) for key in ("epoch", "offset")
    ):
        return "state sampler with epoch and offset"
    return None


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


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What all actors had after a step.

    `num_missing` inverse workers provided no factors, because they died, are still starting, or
    did not answer in time. Their layers keep the factors that are known of them.
    """

    content: CheckpointContent
    num_missing: int


def take_snapshot(crew: Crew, *, statistics_step: int, cursor: SamplerCursor) -> Snapshot:
    """Copy what belongs into a checkpoint of the step that the crew has just finished.

    Args:
        crew: the actors, between two steps.
        statistics_step: the factors must include the statistics of this step.
        cursor: the position in the training data after the step.

    Raises:
        JobFailedError: the workers' parameters differ from the server's.
    """
    _check_mirrors(crew)
    timeout = crew.group_timeout_seconds
    asked = crew.inverse_pool.snapshots(statistics_step, timeout)
    parts = crew.gather_optional(asked)
    for part in parts:
        crew.inverse_pool.averages.keep(part)
    averages = crew.inverse_pool.averages.known()
    server = crew.server_snapshot()
    buffers = crew.share_buffers()
    state: dict[str, object] = {"sampler": {"epoch": cursor.epoch, "offset": cursor.offset}}
    if not averages:  # no layers, or all inverse workers died before their first snapshot
        state[_WITHOUT_FACTORS] = True

    def roles() -> dict[str, Mapping[str, Array]]:
        found: dict[str, Mapping[str, Array]] = {SERVER_ROLE: server()}
        if averages:
            found[FACTORS_ROLE] = unpack_averages(averages)
        if buffers:
            found[_BUFFERS_ROLE] = buffers
        return found

    content = CheckpointContent(step=crew.step, roles=roles, state=state)
    num_missing = crew.inverse_pool.num_starting + len(asked) - len(parts)
    return Snapshot(content=content, num_missing=num_missing)


def _check_mirrors(crew: Crew) -> None:
    # Each worker applies updates to its own copy of the parameters; equal checksums prove that
    # none has drifted.
    diverged = crew.diverged_workers()
    if diverged:
        raise JobFailedError(
            f"the parameters of gradient workers {', '.join(map(str, diverged))} differ from those "
            f"of the parameter server at step {crew.step}",
            reason="diverged_mirrors",
        )
