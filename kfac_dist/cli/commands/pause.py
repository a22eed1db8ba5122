"""`kfac-dist pause`: stop a job at a checkpoint."""

from __future__ import annotations

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format


def pause(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Stop a job at a checkpoint.

    The job is PAUSED once nothing of it runs; kfac-dist resume continues it.
    """
    with connect(server, ca) as client:
        job = client.pause(job_id)
    write_state(job, output)
