"""`kfac-dist logs`: the workers' logs, during the job and after it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.connection import connect
from kfac_dist.cli.failure import Interrupted
from kfac_dist.cli.job_view import readable_line
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, as_json, as_yaml, local_time, moment
from kfac_dist.cli.signals import interrupt_at_end
from kfac_dist.cli.terminal import indented
from kfac_dist.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from kfac_dist.service.job_records import LogLine


def logs(
    job_id: JobArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Wait for new lines until the job has ended.")
    ] = False,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            metavar="ROLE",
            help="Only logs of this role, for example inverse_worker. Repeatable.",
        ),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--rank", metavar="N", help="Only logs of this rank. Repeatable."),
    ] = None,
    attempts: Annotated[
        list[int] | None,
        typer.Option("--attempt", metavar="N", help="Only logs of this attempt. Repeatable."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option("--tail", metavar="N", min=0, help="Begin N lines before each log's end."),
    ] = None,
    resume_token: Annotated[
        str | None,
        typer.Option(
            "--resume-token",
            metavar="TOKEN",
            help="Continue after the last line of an interrupted call, which printed this token.",
        ),
    ] = None,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Print the workers' logs, merged by time.

    With -o json, each line is one object. Ctrl-C does not end the job; it prints the command that
    continues after the last line shown. If the server restarts, the command waits for it.
    """
    if tail is not None and resume_token:
        raise UsageError(
            "--tail: cannot be used together with --resume-token, which says where to begin"
        )
    options: list[tuple[str, object]] = [
        *(("--role", role) for role in roles or ()),
        *(("--rank", rank) for rank in ranks or ()),
        *(("--attempt", attempt) for attempt in attempts or ()),
        ("--server", server),
        ("--ca", ca),
        ("-o", None if output is Format.table else output.value),
    ]
    with connect(server, ca) as client:
        stream = client.logs(
            job_id,
            follow=follow,
            roles=roles or (),
            ranks=ranks or (),
            attempts=attempts or (),
            tail_lines=tail,
            resume_token=resume_token or "",
        )
        token = resume_token
        try:
            for batch in stream.batches:
                with interrupt_at_end():  # there is a token only after a whole batch
                    _write(batch.lines, output)
                    token = batch.resume_token
        except (KeyboardInterrupt, UnreachableError) as error:
            options.append(("--resume-token", token) if token else ("--tail", tail))
            hint = f"continue after the last line with: {_command(job_id, options, follow=follow)}"
            if isinstance(error, UnreachableError):
                raise UnreachableError(f"{error.message}; {hint}") from error
            hint = f"detached; job {job_id} continues to run; {hint}"
            raise Interrupted(hint, {"resume_token": token}) from error


def _command(job_id: str, options: Sequence[tuple[str, object]], *, follow: bool) -> str:
    """Return the command line of a call with these options, without those that are None."""
    words = [word for name, value in options if value is not None for word in (name, str(value))]
    return shlex.join(["kfac-dist", "logs", job_id, *(["-f"] if follow else []), *words])


def _write(lines: Sequence[LogLine], output: Format) -> None:
    text = "".join(_shown(line, output) + "\n" for line in lines)
    left = memoryview(text.encode(sys.stdout.encoding, sys.stdout.errors or "strict"))
    while left:  # with PYTHONUNBUFFERED, a signal may cut a write short
        left = left[sys.stdout.buffer.write(left) :]
    sys.stdout.flush()


def _shown(line: LogLine, output: Format) -> str:
    if output is Format.table:
        return indented(f"{_prefix(line)} {readable_line(line.text)}")
    facts = {
        "role": line.role,
        "rank": line.rank,
        "attempt": line.attempt,
        "time": moment(line.time),
        "text": line.text,
    }
    if output is Format.json:
        return as_json(facts)
    return "---\n" + as_yaml(facts)


def _prefix(line: LogLine) -> str:
    from kfac_dist.runs.run_places import LogName

    stem = LogName(line.role, line.rank, line.attempt).stem
    when = "" if line.time is None else f"{local_time(line.time)} "
    return f"{when}{stem}"
