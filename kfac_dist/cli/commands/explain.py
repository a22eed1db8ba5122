"""`kfac-dist explain`: why a job failed, or why it waits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kfac_dist.cli.connection import connect
from kfac_dist.cli.job_view import attempt_facts, event_facts, readable_line
from kfac_dist.cli.options import CaOption, JobArgument, OutputOption, ServerOption
from kfac_dist.cli.output import Format, local_time, write_result, write_text
from kfac_dist.cli.terminal import indented

if TYPE_CHECKING:
    from kfac_dist.service.explanation import Explanation
    from kfac_dist.service.job_records import Attempt


def explain(
    job_id: JobArgument,
    server: ServerOption = None,
    ca: CaOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Explain why a job failed, or why it waits.

    It shows the attempts, the worker that failed first, the warnings and errors that followed, and
    advice.
    """
    from kfac_dist.service.explanation import explain_job

    with connect(server, ca) as client:
        explanation = explain_job(
            client.get(job_id), list(client.events(job_id)), client.attempts(job_id)
        )
    if output is Format.table:
        write_text("\n".join(_lines(explanation)))
    else:
        write_result(_facts(explanation), output)


def _facts(explanation: Explanation) -> dict[str, Any]:
    failure = explanation.first_failure
    return {
        "job": explanation.job,
        "state": str(explanation.state),
        "reason": explanation.reason,
        "message": explanation.message,
        "attempts": [attempt_facts(attempt) for attempt in explanation.attempts],
        "first_failure": None if failure is None else asdict(failure),
        "echoes": [event_facts(event) for event in explanation.echoes],
        "advice": explanation.advice,
    }


def _lines(explanation: Explanation) -> list[str]:
    reason = f" ({explanation.reason})" if explanation.reason else ""
    lines = [f"{explanation.job} is {explanation.state}{reason}"]
    if explanation.message:
        lines += [f"  {line}" for line in explanation.message.splitlines()]
    if explanation.attempts:
        lines += ["", "attempts:", *map(_attempt_line, explanation.attempts)]
    failure = explanation.first_failure
    if failure is not None:
        when = local_time(failure.time_seconds)
        lines += ["", f"first failure: {failure.role} {failure.rank} at {when}"]
        logged = map(readable_line, failure.log_tail.splitlines())
        lines += [f"  | {line}" for text in logged for line in text.splitlines()]
    if explanation.echoes:
        lines += ["", "what followed:" if failure else "warnings and errors:"]
        lines += [
            indented(
                f"  {local_time(event.time)} {event.severity}: step {event.step}: {event.message}"
            )
            for event in explanation.echoes
        ]
    if explanation.advice:
        lines += ["", f"advice: {explanation.advice}"]
    return lines


def _attempt_line(attempt: Attempt) -> str:
    begun = attempt.resumed_from_step
    where = f" from step {begun}" if begun else ""
    until = "" if attempt.ended_at is None else f" to {local_time(attempt.ended_at)}"
    when = f"{local_time(attempt.started_at)}{until}"
    why = ": ".join(filter(None, (attempt.reason, attempt.message)))
    line = f"  {attempt.number} {attempt.state}{where}, {when}"
    return indented(f"{line}: {why}" if why else line)
