"""`kfac-dist retry`: try an ended job again."""

from __future__ import annotations

from kfac_dist.cli.connection import CaOption, JobArgument, ServerOption, connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import OutputOption
from kfac_dist.cli.output import Format


def retry(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Try a failed or cancelled job again, from its newest checkpoint."""
    with connect(server, ca) as client:
        job = client.retry(job_id)
    write_state(job, output)
