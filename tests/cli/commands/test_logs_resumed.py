"""Logs that a user leaves with Ctrl-C and continues later, as processes."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.service.job_records import Job, Role
from tests.end_to_end.command import CommandLine
from tests.service.requests import spec
from tests.service.serving import Serving, serving

NUM_LINES = 1200
LONG = "x" * 400  # so that a batch is larger than the buffer of a pipe


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def command(server: Serving, tmp_path: Path) -> CommandLine:
    made = CommandLine(tmp_path)
    made.environment["PYTHONUNBUFFERED"] = "1"  # common in containers; signals cut writes short
    made.environment["KFAC_DIST_SERVER"] = server.address
    made.environment["KFAC_DIST_TOKEN"] = server.token("ada", Role.SUBMITTER)
    return made


@pytest.fixture
def job(server: Serving) -> Job:
    with server.client() as client:
        made = client.submit(spec())
    server.jobs.log_dir(made.id).mkdir(parents=True)
    return made


def append(server: Serving, job: Job, name: str, *lines: str) -> None:
    with (server.jobs.log_dir(job.id) / name).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def interrupt_at_first_line(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C after the first line; return all of stdout, and stderr."""
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        # communicate() would lose what readline() has read ahead.
        shown = first + process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    return shown, errors


def test_no_line_is_lost_or_repeated(server: Serving, command: CommandLine, job: Job) -> None:
    written = [f"{number} {LONG}" for number in range(NUM_LINES)]
    append(server, job, "driver-0.log", *written)
    append(server, job, "inverse_worker-0.log", "of another role")
    # Nobody reads its output, so the interrupt comes in the middle of writing a batch.
    process = command.start("logs", job.id, "-f", "--role", "driver")
    shown, errors = interrupt_at_first_line(process)
    assert shown.splitlines() == [f"driver-0 {line}" for line in written[: shown.count("\n")]]
    assert shown.count("\n") < NUM_LINES
    assert f"job {job.id} continues to run" in errors
    told = shlex.split(errors.split("continue after the last line with: ")[1])
    assert told[:6] == ["kfac-dist", "logs", job.id, "-f", "--role", "driver"]
    append(server, job, "driver-0.log", "written meanwhile")
    server.jobs.cancel(job.id)
    rest = command.run(*told[1:])  # ends with the job
    assert rest.returncode == 0, rest.stderr
    lines = [*written, "written meanwhile"]
    assert (shown + rest.stdout).splitlines() == [f"driver-0 {line}" for line in lines]


def test_programs_get_the_token_as_json(server: Serving, command: CommandLine, job: Job) -> None:
    append(server, job, "driver-0.log", "one")
    process = command.start("logs", job.id, "-f", "-o", "json")
    shown, errors = interrupt_at_first_line(process)
    told = json.loads(errors)["error"]
    assert (told["type"], told["exit_code"]) == ("Interrupted", 130)
    append(server, job, "driver-0.log", "two")
    rest = command.run("logs", job.id, "-o", "json", "--resume-token", told["resume_token"])
    lines = [json.loads(line)["text"] for line in (shown + rest.stdout).splitlines()]
    assert lines == ["one", "two"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("nonsense", "resume_token: not a token that this server gave"),
        ("of another job", "resume_token: belongs to the logs of job"),
        ("with a tail", "--tail: cannot be used together with --resume-token"),
    ],
)
def test_a_wrong_token_is_exit_code_2(
    server: Serving, command: CommandLine, job: Job, token: str, message: str
) -> None:
    options: list[str] = []
    if token == "of another job":
        with server.client() as client:
            other = client.submit(spec())
            server.jobs.log_dir(other.id).mkdir(parents=True)
            append(server, other, "driver-0.log", "of another job")
            (batch,) = client.logs(other.id).batches
        token = batch.resume_token
    elif token == "with a tail":
        options = ["--tail", "3"]
    append(server, job, "driver-0.log", "one")
    done = command.run("logs", job.id, "--resume-token", token, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
