"""`kfac-dist resume`: let a paused job go on."""

from __future__ import annotations

from kfac_dist.cli.connection import CaOption, JobArgument, ServerOption, connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import OutputOption
from kfac_dist.cli.output import Format


def resume(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Let a paused job go on, from its newest checkpoint, when it is its turn."""
    with connect(server, ca) as client:
        job = client.resume(job_id)
    write_state(job, output)
