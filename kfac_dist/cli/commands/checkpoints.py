"""`kfac-dist checkpoints`: the checkpoints from which a job can resume."""

from __future__ import annotations

from kfac_dist.cli.connection import connect
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, make_table, moment, write_result


def checkpoints(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """List a job's checkpoints, newest first.

    A checkpoint is verified only when a job resumes from it.
    """
    with connect(server, ca) as client:
        found = client.checkpoints(job_id)
    columns = ("step", "created_at", "size_bytes", "path")
    rows = [
        (checkpoint.step, moment(checkpoint.created_at), checkpoint.size_bytes, checkpoint.path)
        for checkpoint in found
    ]
    write_result(
        {"job": job_id, "checkpoints": [dict(zip(columns, row, strict=True)) for row in rows]},
        output,
        make_table(columns, rows, right=("step", "size_bytes")),
    )
