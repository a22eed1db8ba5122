"""`kfac-dist cancel`: end a job."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_dist.cli.connection import CaOption, JobArgument, ServerOption, connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import OutputOption
from kfac_dist.cli.output import Format


def cancel(
    job_id: JobArgument,
    now: Annotated[
        bool, typer.Option("--now", help="Kill at once, instead of leaving a checkpoint.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until nothing of the job is left.")
    ] = False,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """End a job. It is CANCELLED once its processes, memory and placement are gone.

    A job that did its last step first has SUCCEEDED.
    """
    with connect(server, ca) as client:
        job = client.cancel(job_id, now=now)
        if wait:
            job = client.wait(job_id)
    write_state(job, output)
