"""`kfac-dist watch`: follow a job on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kfac_dist.cli.connection import connect
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.job_view import event_facts, job_row, write_state
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, as_json, as_yaml

if TYPE_CHECKING:
    from kfac_dist.service.client import Client, Update


def watch(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Follow a job until it ends: its state, its numbers, the staleness of each layer's inverse.

    Ctrl-C detaches; the job keeps running. With -o json, each update is one object on a line.
    """
    with connect(server, ca) as client:
        try:
            if output is not Format.table:
                _write_updates(client, job_id, output)
            elif sys.stdout.isatty():
                _live(client, job_id)
            else:
                from kfac_dist.cli.following import follow

                write_state(follow(client, client.get(job_id), plain=True), output)
        except KeyboardInterrupt as error:
            raise Interrupted(f"detached; job {job_id} keeps running") from error


def _live(client: Client, job_id: str) -> None:
    from rich.live import Live

    from kfac_dist.cli.watch_view import METRICS, WatchView

    view = WatchView(client.get(job_id))
    with Live(view, refresh_per_second=4, screen=False) as live:
        for update in client.watch(job_id, metrics=METRICS):
            view.add(update)
            live.update(view)


def _write_updates(client: Client, job_id: str, output: Format) -> None:
    from kfac_dist.cli.watch_view import METRICS

    for update in client.watch(job_id, metrics=METRICS):
        facts = _facts(update)
        text = as_json(facts) if output is Format.json else "---\n" + as_yaml(facts)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _facts(update: Update) -> dict[str, object]:
    return {
        "job": None if update.job is None else job_row(update.job),
        "events": [event_facts(event) for event in update.events],
        "metrics": {
            series.name: [
                [point.step, point.value if abs(point.value) < float("inf") else None]
                for point in series.points
            ]
            for series in update.metrics
        },
    }
