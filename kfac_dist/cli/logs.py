"""`kfac-dist logs`: what the workers wrote, during the job and after."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_dist.cli.connection import CaOption, JobArgument, ServerOption, connect
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.job_view import iso_time
from kfac_dist.cli.options import OutputOption
from kfac_dist.cli.output import Format

if TYPE_CHECKING:
    from kfac_dist.service.logs import LogLine

# Told by the prefix of the line already.
_IN_PREFIX = frozenset({"timestamp", "event", "level", "role", "rank", "attempt", "job"})


def logs(
    job_id: JobArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Wait for more until the job has ended.")
    ] = False,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--role", metavar="ROLE", help="Only this role, as inverse_worker; repeatable."
        ),
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", metavar="N", help="Only this rank; repeatable.")
    ] = None,
    attempts: Annotated[
        list[int] | None,
        typer.Option("--attempt", metavar="N", help="Only this attempt; repeatable."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option("--tail", metavar="N", min=0, help="Begin N lines before each log's end."),
    ] = None,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Print the workers' logs, merged by time. With -o json one object a line.

    Ctrl-C detaches and leaves the job alone. A server that is started again is waited for.
    """
    with connect(server, ca) as client:
        lines = client.logs(
            job_id,
            follow=follow,
            roles=roles or (),
            ranks=ranks or (),
            attempts=attempts or (),
            tail_lines=tail,
        )
        try:
            for line in lines:
                sys.stdout.write(_shown(line, output) + "\n")
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            hint = f"detached; job {job_id} goes on, kfac-dist logs {job_id} -f --tail 0 follows it"
            raise Interrupted(hint) from error


def _shown(line: LogLine, output: Format) -> str:
    if output is Format.table:
        return f"{_prefix(line)} {_readable(line.text)}"
    facts = {
        "role": line.role,
        "rank": line.rank,
        "attempt": line.attempt,
        "time": iso_time(line.time),
        "text": line.text,
    }
    if output is Format.json:
        return json.dumps(facts, ensure_ascii=False)
    import yaml

    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip()


def _prefix(line: LogLine) -> str:
    attempt = "" if line.attempt == 1 else f".a{line.attempt}"
    when = "" if line.time is None else f"{datetime.fromtimestamp(line.time, UTC):%H:%M:%S} "
    return f"{when}{line.role}-{line.rank}{attempt}"


def _readable(text: str) -> str:
    """A line of the project's own logs as words; any other as it is."""
    try:
        values = json.loads(text)
    except ValueError:
        return text
    if not isinstance(values, dict) or "event" not in values:
        return text
    rest = [f"{key}={_value(value)}" for key, value in values.items() if key not in _IN_PREFIX]
    level = values.get("level", "info")
    return " ".join(([] if level == "info" else [f"[{level}]"]) + [str(values["event"]), *rest])


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
