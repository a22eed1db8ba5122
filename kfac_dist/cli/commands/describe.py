"""`kfac-dist describe`: all facts about one job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import GROUP_NUMBERS, described
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, key_table, make_table, write_result, write_table

if TYPE_CHECKING:
    from kfac_dist.service.client import Client
    from kfac_dist.service.job_records import Job

_FEW_STEPS = 20


def describe(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Show a job's state, results, workers, attempts and resolved specification."""
    with connect(server, ca) as client:
        job = client.get(job_id)
        facts = described(job, client.attempts(job_id), _group(client, job))
    if output is not Format.table:
        write_result(facts, output)
        return
    attempts = facts.pop("attempts")
    write_table(key_table(facts))
    if attempts:
        columns = ("number", "state", "started_at", "ended_at", "resumed_from_step", "message")
        rows = [[attempt[column] for column in columns] for attempt in attempts]
        write_table(make_table(("attempt", *columns[1:]), rows, right=()))


def _group(client: Client, job: Job) -> dict[str, int] | None:
    """Return the epoch and size of the group that did the last step; None before the first one."""
    if not {*GROUP_NUMBERS} <= {*client.metric_names(job.id)}:
        return None
    newest = max(1, job.step - _FEW_STEPS)  # few enough that no number is a mean over several
    found = client.metrics(job.id, GROUP_NUMBERS, first_step=newest)
    return {series.name: int(series.points[-1].value) for series in found if series.points} or None
