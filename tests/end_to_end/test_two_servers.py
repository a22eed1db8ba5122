"""Two control planes on one machine, each with a cluster of its own: neither sees the other's."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest

from tests.end_to_end.command import SPEC, CommandLine
from tests.end_to_end.server import PATIENCE, Server, answer
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    running = [Server(CommandLine(tmp_path_factory.mktemp(name))) for name in ("one", "two")]
    yield running
    for server in running:
        server.end()


def drivers(job: str) -> list[psutil.Process]:
    """The processes that run an attempt of a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "driver" in words and any(word.endswith(f"runs/{job}") for word in words):
            found.append(process)
    return found


def test_both_run_a_job_at_once_and_neither_sees_the_others(servers: list[Server]) -> None:
    commands = [server.command for server in servers]
    jobs = [
        answer(command, "submit", command.spec(SPEC), "--set", "steps=100000")["job"]
        for command in commands
    ]
    clusters = [
        json.loads((command.folder / "home/ray/head.json").read_text())["gcs_address"]
        for command in commands
    ]
    assert clusters[0] != clusters[1]

    def trains(command: CommandLine, job: str) -> bool:
        (row,) = answer(command, "list")["jobs"]
        assert row["job"] == job
        assert row["state"] in ("PENDING", "QUEUED", "STARTING", "RUNNING", "DEGRADED"), row
        return bool(row["step"] >= 1)

    for command, job in zip(commands, jobs, strict=True):
        wait_until(lambda c=command, j=job: trains(c, j), f"{job} trains", PATIENCE)
    for job, own, others in zip(jobs, clusters, reversed(clusters), strict=True):
        (driver,) = drivers(job)
        assert own in driver.cmdline()  # it was sent to the cluster of its server
        assert others not in driver.cmdline()
    for command, foreign in zip(commands, reversed(jobs), strict=True):
        assert command.run("describe", foreign).returncode == 4

    # What ends one leaves the other alone.
    assert answer(commands[0], "cancel", jobs[0], "--now", "--wait")["state"] == "CANCELLED"
    servers[0].end()
    reached = answer(commands[1], "describe", jobs[1])["step"]
    wait_until(
        lambda: answer(commands[1], "describe", jobs[1])["step"] > reached, "more steps", PATIENCE
    )
    (attempt,) = answer(commands[1], "describe", jobs[1])["attempts"]
    assert attempt["attempt"] == 1
