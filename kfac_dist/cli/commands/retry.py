"""`kfac-dist retry`: start a new attempt of an ended job."""

from __future__ import annotations

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format


def retry(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Retry a failed or cancelled job from its newest checkpoint."""
    with connect(server, ca) as client:
        job = client.retry(job_id)
    write_state(job, output)
