"""`kfac-dist scale`: change the number of workers of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format
from kfac_dist.errors import UsageError


def scale(
    job_id: JobArgument,
    gradient: Annotated[
        int | None, typer.Option("--gradient", min=1, metavar="N", help="Gradient workers.")
    ] = None,
    inverse: Annotated[
        int | None, typer.Option("--inverse", min=1, metavar="M", help="Inverse workers.")
    ] = None,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Change the number of workers of a job.

    A running job gets or gives up inverse workers while it trains. The number of gradient workers
    changes with its next attempt, for example after kfac-dist pause and resume.
    """
    if gradient is None and inverse is None:
        raise UsageError("give --gradient N, --inverse M, or both")
    with connect(server, ca) as client:
        job = client.scale(job_id, gradient=gradient, inverse=inverse)
    write_state(job, output)
