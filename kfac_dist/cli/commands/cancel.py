"""`kfac-dist cancel`: cancel a job."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format


def cancel(
    job_id: JobArgument,
    now: Annotated[
        bool, typer.Option("--now", help="Kill the job at once, without a checkpoint.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until nothing of the job is left.")
    ] = False,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Cancel a job.

    The job is CANCELLED once its processes, memory and placement are gone. It is SUCCEEDED instead
    if it finished its last step before that.
    """
    with connect(server, ca) as client:
        job = client.cancel(job_id, now=now)
        if wait:
            job = client.wait(job_id)
    write_state(job, output)
