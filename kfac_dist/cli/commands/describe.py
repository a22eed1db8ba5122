"""`kfac-dist describe`: all facts about one job."""

from __future__ import annotations

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import described
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, key_table, make_table, write_result, write_table


def describe(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Show a job's state, results, attempts and resolved specification."""
    with connect(server, ca) as client:
        facts = described(client.get(job_id), client.attempts(job_id))
    if output is not Format.table:
        write_result(facts, output)
        return
    attempts = facts.pop("attempts")
    write_table(key_table(facts))
    if attempts:
        columns = ("number", "state", "started_at", "ended_at", "resumed_from_step", "message")
        rows = [[attempt[column] for column in columns] for attempt in attempts]
        write_table(make_table(("attempt", *columns[1:]), rows, right=()))
