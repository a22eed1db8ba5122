"""`kfac-dist train`: train a job in the foreground."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist._home import data_cache, runs_dir
from kfac_dist.cli.environment import absolute, data_folder, data_place, home
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.options import (
    DataDirOption,
    MetricsPortOption,
    OutputOption,
    SetOption,
    SpecArgument,
)
from kfac_dist.cli.output import Format, write_result
from kfac_dist.cli.progress import make_progress
from kfac_dist.cli.signals import terminate_is_interrupt
from kfac_dist.errors import JobFailedError

if TYPE_CHECKING:
    from kfac_dist.config import JobSpec
    from kfac_dist.runs import JobSummary
    from workers.driver.records.metrics_server import MetricsServer


def train(
    spec: SpecArgument,
    overrides: SetOption = None,
    data: DataDirOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="The run's folder. Default: runs/NAME in $KFAC_DIST_HOME.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run in the folder from its newest checkpoint."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the job and print what would run, then stop."),
    ] = False,
    metrics_port: MetricsPortOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Train a job in the foreground, with workers on this machine.

    Progress goes to stderr, the summary to stdout. Ctrl-C ends the job; --resume continues it.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])
    folder = absolute(run_dir) if run_dir else runs_dir(home()) / job.name
    base_dir = absolute(spec).parent
    if dry_run:
        _check(job, base_dir, data, folder, resume, metrics_port)
        write_result({"run_dir": str(folder), "spec": job.model_dump(mode="json")}, output)
        return
    try:
        summary = _run(job, base_dir, data_place(data), folder, resume, metrics_port, output)
    except JobFailedError as error:
        _write_failed_summary(folder, error, output)
        raise
    _write_summary(summary, output)


def _check(
    job: JobSpec,
    base_dir: Path,
    data: str | None,
    folder: Path,
    resume: bool,
    metrics_port: int | None,
) -> None:
    """Raise the error that would keep the job from starting; reads of the data sets, too."""
    from kfac_dist.coordination.jobs.placement import check_placement, machine_room
    from kfac_dist.runs import check_folder
    from workers.driver.records.metrics_server import metrics_server

    check_folder(folder, job, resume=resume)
    with metrics_server(metrics_port):
        pass  # entering raises if the port is taken
    check_placement(job.workers, machine_room(len(os.sched_getaffinity(0))))

    from workers.driver.preparation import prepare  # imports torch

    ready = prepare(
        job, base_dir=base_dir, data_dir=data_folder(data), cache_dir=data_cache(home())
    )
    for message in ready.check_data():
        typer.echo(message, err=True)


def _run(
    job: JobSpec,
    base_dir: Path,
    data: Path | str | None,
    folder: Path,
    resume: bool,
    metrics_port: int | None,
    output: Format,
) -> JobSummary:
    from kfac_dist.runs import check_folder

    check_folder(folder, job, resume=resume)  # fails at once; importing torch and Ray takes seconds
    progress = make_progress(job.steps, plain=output is Format.table)
    try:
        with terminate_is_interrupt(), _metrics(metrics_port) as metrics, progress:
            from workers.driver.launch import run_job

            return run_job(
                job,
                base_dir=base_dir,
                data_dir=data,
                home=home(),
                run_dir=folder,
                resume=resume,
                on_record=progress.on_record,
                on_event=progress.on_event,
                metrics=metrics,
            )
    except KeyboardInterrupt as error:
        raise Interrupted(f"the run is in {folder}; continue it with --resume") from error


@contextmanager
def _metrics(port: int | None) -> Iterator[MetricsServer | None]:
    """Serve metrics inside the block, and print their address."""
    from workers.driver.records.metrics_server import metrics_server

    with metrics_server(port) as server:
        if server is not None:
            typer.echo(f"metrics at {server.url}", err=True)
        yield server


def _write_failed_summary(folder: Path, error: JobFailedError, output: Format) -> None:
    """Write the summary of the failed job, if its run folder has one."""
    from kfac_dist.runs import RunFolder
    from kfac_dist.runs.run_places import RunPlaces

    if not RunPlaces(folder).has_run:
        return
    summary = RunFolder.open(folder).read_summary()
    if summary is not None and (summary.state, summary.message) == ("FAILED", error.message):
        _write_summary(summary, output)


def _write_summary(summary: JobSummary, output: Format) -> None:
    write_result(json.loads(summary.model_dump_json()), output)
