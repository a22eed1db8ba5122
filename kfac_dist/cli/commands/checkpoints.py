"""`kfac-dist checkpoints`: from where a job can go on."""

from __future__ import annotations

from kfac_dist.cli.connection import CaOption, JobArgument, ServerOption, connect
from kfac_dist.cli.job_view import iso_time
from kfac_dist.cli.options import OutputOption
from kfac_dist.cli.output import Format, make_table, write_result


def checkpoints(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """List a job's checkpoints, newest first. They are verified when a job goes on from one."""
    with connect(server, ca) as client:
        found = client.checkpoints(job_id)
    columns = ("step", "created_at", "size_bytes", "path")
    rows = [(one.step, iso_time(one.created_at), one.size_bytes, one.path) for one in found]
    write_result(
        {"job": job_id, "checkpoints": [dict(zip(columns, row, strict=True)) for row in rows]},
        output,
        make_table(columns, rows, right=("step", "size_bytes")),
    )
