"""`kfac-dist submit`: submit a job to a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.environment import absolute, data_place
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.job_view import described, raise_for_end, write_state
from kfac_dist.cli.options import CaOption, OutputOption, ServerOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, make_table, write_result, write_table

if TYPE_CHECKING:
    from kfac_dist.config import JobSpec
    from kfac_dist.runs.transfer.user_code import UserCode
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
        str | None,
        typer.Option(
            "--data-dir",
            metavar="DIR",
            help="Folder of data sets that every node has, or the URL of one, which every node "
            "fetches. Default: $KFAC_DIST_DATA.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the job and list which files would be sent and which not, then stop.",
        ),
    ] = False,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Submit a job to a server.

    If the task is your own code, the folder of the specification is sent along, without hidden
    files, links and what its .kfacdistignore names. Ctrl-C while waiting does not end the job.
    """
    from kfac_dist.config import load_spec
    from kfac_dist.runs.transfer.user_code import code_of

    job_spec = load_spec(spec, overrides or [])
    base_dir = absolute(spec).parent
    code = code_of(job_spec, base_dir)
    if dry_run:
        _write_plan(job_spec, code, output)
        return
    if code is not None and (surprises := code.contents.surprises()):
        typer.echo(surprises, err=True)
    place = data_place(data)
    with connect(server, ca) as client:
        job = client.submit(
            job_spec,
            base_dir=base_dir,
            priority=priority,
            idempotency_key=idempotency_key,
            data_dir=None if place is None else str(place),
        )
        if not wait:
            write_state(job, output)
            return
        if output is Format.table:
            typer.echo(f"job {job.id}", err=True)
        job = _follow(client, job, output)
        write_result(described(job, client.attempts(job.id)), output)
    raise_for_end(job)


def _write_plan(spec: JobSpec, code: UserCode | None, output: Format) -> None:
    """Write what would be sent: the files, what is left out and why, and the specification."""
    packed = () if code is None else code.contents.packed
    left_out = () if code is None else code.contents.left_out
    if output is Format.table and code is not None:  # first, to help if the folder is too large
        rows = [(file.name, file.num_bytes) for file in packed]
        write_table(make_table(("sent", "bytes"), rows, right=("bytes",)))
        outside = [(entry.name, entry.num_bytes, entry.num_files, entry.why) for entry in left_out]
        columns = ("not sent", "bytes", "files", "why")
        write_table(make_table(columns, outside, right=("bytes", "files")))
    size = None if code is None else len(code.pack())
    sent: dict[str, Any] = {"package_bytes": size, "spec": spec.model_dump(mode="json")}
    if output is not Format.table:
        sent |= {
            "packed": [{"name": file.name, "bytes": file.num_bytes} for file in packed],
            "left_out": [
                {
                    "name": entry.name,
                    "why": entry.why,
                    "files": entry.num_files,
                    "bytes": entry.num_bytes,
                }
                for entry in left_out
            ],
        }
    write_result(sent, output)


def _follow(client: Client, job: Job, output: Format) -> Job:
    from kfac_dist.cli.following import follow

    try:
        return follow(client, job, plain=output is Format.table)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"job {job.id} continues to run; follow it with kfac-dist watch {job.id}"
        ) from error
