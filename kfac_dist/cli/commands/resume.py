"""`kfac-dist resume`: resume a paused job."""

from __future__ import annotations

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format


def resume(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Resume a paused job from its newest checkpoint.

    The job is queued again and starts when its turn comes.
    """
    with connect(server, ca) as client:
        job = client.resume(job_id)
    write_state(job, output)
