"""`kfac-dist replay`: repeat a recorded run, and compare it to the last bit."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.environment import absolute, data_folder, home
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.options import CaOption, DataDirOption, OutputOption, ServerOption
from kfac_dist.cli.output import Format, say, write_result
from kfac_dist.cli.progress import make_progress
from kfac_dist.cli.signals import terminate_is_interrupt
from kfac_dist.config.urls import is_url
from kfac_dist.errors import ConflictError, JobFailedError, NotFoundError

if TYPE_CHECKING:
    from kfac_dist.runs.replay_plan import ReplayPlan
    from kfac_dist.service.job_records import Job
    from workers.driver.replay import ReplayResult


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where on this machine a recorded run, its user code and its data are."""

    run_dir: Path
    base_dir: Path
    data_dir: Path | None


def replay(
    job: Annotated[
        str,
        typer.Argument(metavar="JOB", help="The folder of a run, or the id of a server's job."),
    ],
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Only the first N steps; by default all."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Folder for the replay; by default beside the run, named after it with .replay.",
        ),
    ] = None,
    data: DataDirOption = None,
    base_dir: Annotated[
        Path | None,
        typer.Option(
            "--base-dir",
            metavar="DIR",
            help="Where the files of your own task are; by default in the run's folder if it has "
            "code, else the current folder.",
        ),
    ] = None,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Repeat a recorded run on this machine, with the inverse versions that it used.

    Every step and the tensors of a checkpoint are compared to the last bit; the first difference
    ends the replay with exit code 1. The recorded run is not changed.
    """
    from kfac_dist.runs import RunFolder
    from kfac_dist.runs.replay_plan import REASON, plan_replay

    source = _find(job, base_dir, data, server, ca)
    folder = RunFolder.open(source.run_dir)
    plan = plan_replay(folder, steps)
    target = _target(source.run_dir, run_dir)
    result = _run(plan, folder.places.checkpoints, source, target, output)
    for message in result.refused:
        say(f"warning: {message}")
    write_result(_facts(plan, result), output)
    if result.difference is not None:
        raise JobFailedError(str(result.difference), reason=REASON)


def _find(
    job: str, base_dir: Path | None, data: str | None, server: str | None, ca: Path | None
) -> _Source:
    """Find the run that `job` names: a folder that exists, else a job of a server.

    Raises:
        NotFoundError: it does not exist, or this machine cannot read a part of it.
    """
    from kfac_dist.runs.run_places import RunPlaces

    own_base_dir = absolute(base_dir) if base_dir else None
    path = absolute(Path(job))
    if path.is_dir() or os.sep in job:
        if not path.is_dir():
            raise NotFoundError(f"{path}: no such folder; give the folder of a run")
        code = RunPlaces(path).code
        found = own_base_dir or (code if code.is_dir() else Path.cwd())
        return _Source(run_dir=path, base_dir=found, data_dir=data_folder(data))
    with connect(server, ca) as client:
        return _job_source(client.get(job), own_base_dir, data)


def _job_source(job: Job, base_dir: Path | None, data: str | None) -> _Source:
    from kfac_dist.runs.run_places import RunPlaces

    run_dir = Path(job.run_dir)
    _check_readable(job, "run folder", run_dir, "copy it here and give the copy instead of the id")
    code = RunPlaces(run_dir).code
    if base_dir is None and job.package is not None:
        _check_readable(job, "user code", code, "give a copy of it with --base-dir")
    if data is None and job.data_dir is not None and not is_url(job.data_dir):
        _check_readable(job, "data", Path(job.data_dir), "give a copy of them with --data-dir")
    data = data or job.data_dir
    return _Source(run_dir=run_dir, base_dir=base_dir or code, data_dir=data_folder(data))


def _check_readable(job: Job, what: str, path: Path, otherwise: str) -> None:
    if not os.access(path, os.R_OK | os.X_OK):
        raise NotFoundError(
            f"job {job.id}: its {what}, {path} at the server, cannot be read on this machine; "
            f"{otherwise}"
        )


def _target(recorded: Path, wanted: Path | None) -> Path:
    """Return the folder for the replay: `wanted`, or the first free one beside `recorded`.

    Raises:
        ConflictError: `wanted` holds a run.
    """
    from kfac_dist.runs.run_places import RunPlaces

    if wanted is None:
        names = (f"{recorded.name}.replay{'' if n == 1 else f'-{n}'}" for n in count(1))
        return next(path for name in names if not (path := recorded.with_name(name)).exists())
    wanted = absolute(wanted)
    if RunPlaces(wanted).has_run:
        raise ConflictError(
            f"{wanted}: this folder holds a run; choose another with --run-dir, or leave the "
            "option out for a new folder beside the run"
        )
    return wanted


def _run(
    plan: ReplayPlan, checkpoints_dir: Path, source: _Source, target: Path, output: Format
) -> ReplayResult:
    progress = make_progress(plan.last_step, plain=output is Format.table)
    try:
        with terminate_is_interrupt(), progress:
            from workers.driver.replay import run_replay  # loads torch and Ray

            return run_replay(
                plan,
                checkpoints_dir=checkpoints_dir,
                base_dir=source.base_dir,
                data_dir=source.data_dir,
                home=home(),
                run_dir=target,
                on_record=progress.on_record,
                on_event=progress.on_event,
            )
    except KeyboardInterrupt as error:
        raise Interrupted(f"the replay so far is in {target}; it cannot be resumed") from error


def _facts(plan: ReplayPlan, result: ReplayResult) -> dict[str, Any]:
    return {
        "job": plan.job,
        "run_dir": str(result.run_dir),
        "steps": result.num_steps,
        "identical": result.difference is None,
        "first_difference": None if result.difference is None else asdict(result.difference),
        "checkpoint": result.checkpoint_step,
        "stopped_at": None if plan.stop is None else asdict(plan.stop),
    }
