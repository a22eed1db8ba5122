"""`kfac-dist submit`: submit a job to a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.environment import absolute, data_dir
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.job_view import described, raise_for_end, write_state
from kfac_dist.cli.options import CaOption, OutputOption, ServerOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, write_result

if TYPE_CHECKING:
    from kfac_dist.service.client import Client
    from kfac_dist.service.job_records import Job


def submit(
    spec: SpecArgument,
    overrides: SetOption = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the job to its end, and exit with its exit code."),
    ] = False,
    priority: Annotated[
        int,
        typer.Option("--priority", metavar="N", help="Jobs with a higher priority start earlier."),
    ] = 0,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            metavar="KEY",
            help="Submitting the same job again with the same key returns the first one.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            metavar="DIR",
            help="Folder of data sets on the cluster's file system. Default: $KFAC_DIST_DATA.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the job and print what would be sent, then stop."),
    ] = False,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Submit a job to a server.

    If the task is your own code, the folder of the specification is sent along. Ctrl-C while
    waiting does not end the job.
    """
    from kfac_dist.config import load_spec

    job_spec = load_spec(spec, overrides or [])
    base_dir = absolute(spec).parent
    if dry_run:
        from kfac_dist.service.client.code import package_of

        package = package_of(job_spec, base_dir)
        size = None if package is None else len(package)
        sent = {"package_bytes": size, "spec": job_spec.model_dump(mode="json")}
        write_result(sent, output)
        return
    folder = data_dir(data)
    with connect(server, ca) as client:
        job = client.submit(
            job_spec,
            base_dir=base_dir,
            priority=priority,
            idempotency_key=idempotency_key,
            data_dir=None if folder is None else str(folder),
        )
        if not wait:
            write_state(job, output)
            return
        if output is Format.table:
            typer.echo(f"job {job.id}", err=True)
        job = _follow(client, job, output)
        write_result(described(job, client.attempts(job.id)), output)
    raise_for_end(job)


def _follow(client: Client, job: Job, output: Format) -> Job:
    from kfac_dist.cli.following import follow

    try:
        return follow(client, job, plain=output is Format.table)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"job {job.id} continues to run; follow it with kfac-dist watch {job.id}"
        ) from error
