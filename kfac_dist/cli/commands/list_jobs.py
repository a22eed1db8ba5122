"""`kfac-dist list`: the jobs on a server."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import job_row, jobs_table
from kfac_dist.cli.options import CaOption, OutputOption, ServerOption
from kfac_dist.cli.output import Format, say, write_result
from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState

_PAGE_SIZE = 1000  # the largest that a server accepts


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
    everything: Annotated[
        bool, typer.Option("--all", help="List all jobs, however many there are.")
    ] = False,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """List jobs, newest first, each on one line."""
    wanted = set(states or ())
    if active:
        wanted |= set(JobState) - ENDED
    with connect(server, ca) as client:
        size = _PAGE_SIZE if everything else min(limit, _PAGE_SIZE)
        pages = client.jobs(states=sorted(wanted), owner=owner, name=name, page_size=size)
        jobs = list(islice(pages, None if everything else limit))
        total = len(jobs)
        if not everything and total == limit:  # there may be more
            total = max(total, client.count(states=sorted(wanted), owner=owner, name=name))
    facts = {"jobs": [job_row(job) for job in jobs], "total": total}
    write_result(facts, output, jobs_table(jobs))
    if output is Format.table and total > len(jobs):
        say(f"{len(jobs)} of {total} shown; --limit N or --all shows more")
