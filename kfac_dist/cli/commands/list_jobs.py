"""`kfac-dist list`: the jobs on a server."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import job_row, jobs_table
from kfac_dist.cli.options import CaOption, OutputOption, ServerOption
from kfac_dist.cli.output import Format, write_result
from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState


def list_jobs(
    states: Annotated[
        list[JobState] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            case_sensitive=False,
            help="Only jobs in this state, for example RUNNING. Repeatable.",
        ),
    ] = None,
    active: Annotated[
        bool, typer.Option("--active", help="Only jobs that have not ended.")
    ] = False,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="NAME", help="Only jobs of the token with this name."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Only jobs with this name.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="List at most this many jobs.")
    ] = 50,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """List jobs, newest first."""
    wanted = set(states or ())
    if active:
        wanted |= set(JobState) - ENDED
    with connect(server, ca) as client:
        pages = client.jobs(
            states=sorted(wanted), owner=owner, name=name, page_size=min(limit, 1000)
        )
        jobs = list(islice(pages, limit))
    write_result({"jobs": [job_row(job) for job in jobs]}, output, jobs_table(jobs))
