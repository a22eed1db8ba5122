"""The control plane as a user sees it: a server, two jobs, and a kill -9 in between."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from kfac_dist import Client
from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState
from kfac_dist.errors import NotFoundError
from kfac_dist.service.access.local import read_local_token, read_server
from tests.end_to_end.command import SPEC, CommandLine
from tests.end_to_end.server import PATIENCE, Server, answer, processes_with
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)
STEPS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests, since a Ray cluster starts slowly. The last test ends it."""
    running = Server(CommandLine(tmp_path_factory.mktemp("service")))
    yield running
    running.end()


@pytest.fixture
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A control plane with another home on the same machine."""
    running = Server(CommandLine(tmp_path_factory.mktemp("neighbour")))
    yield running
    running.end()


def drivers(job: str) -> list[psutil.Process]:
    """The processes that run an attempt of a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "driver" in words and any(word.endswith(f"runs/{job}") for word in words):
            found.append(process)
    return found


def client_of(server: Server) -> Client:
    """A client like that of the server's own user."""
    home = server.command.folder / "home"
    local = read_server(home)
    assert local is not None
    return Client(local.address, token=read_local_token(home))


def cluster_of(server: Server) -> str:
    facts = json.loads((server.command.folder / "home/ray/head.json").read_text())
    return str(facts["gcs_address"])


def test_a_failing_task_is_explained_and_can_be_retried(server: Server) -> None:
    command = server.command
    folder = command.folder / "own"
    folder.mkdir()
    (folder / "task.py").write_text(
        "class Broken:\n"
        "    distribution = 'gaussian'\n"
        "    def model(self):\n"
        "        raise RuntimeError('no such luck')\n"
        "    def train_data(self, data_dir):\n"
        "        raise NotImplementedError\n"
        "    test_data = train_data\n"
    )
    spec = folder / "job.yaml"
    spec.write_text("name: own\ntask: task.py:Broken\nsteps: 2\nbatch_size: 2\n")
    done = command.run("submit", spec, "--wait", "-o", "json", seconds=PATIENCE)
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert (facts["state"], facts["reason"]) == ("FAILED", "user_task")
    assert "no such luck" in done.stderr
    explained = command.run("explain", facts["job"], seconds=PATIENCE)
    assert explained.returncode == 0
    assert "no such luck" in explained.stdout
    assert answer(command, "retry", facts["job"])["state"] == "QUEUED"
    assert command.run("retry", "none-such").returncode == 4
    assert command.run("resume", facts["job"], "--server", "127.0.0.1:9").returncode == 5


def test_a_second_server_with_the_same_home_is_refused(server: Server) -> None:
    done = server.command.run("serve", "--listen", "127.0.0.1:0")
    assert done.returncode == 9
    assert "another server already uses this home" in done.stderr


def test_two_servers_run_jobs_at_once_and_neither_sees_the_other(
    server: Server, neighbour: Server
) -> None:
    one, two = neighbour, server
    assert cluster_of(one) != cluster_of(two)
    with client_of(one) as first, client_of(two) as second:
        spec = one.command.spec(SPEC)
        changes = ["name=shared", "steps=100000"]
        ours, theirs = (client.submit(spec, overrides=changes).id for client in (first, second))

        def trains(client: Client, job: str) -> bool:
            (listed,) = client.jobs(name="shared")
            assert listed.id == job
            assert listed.state not in ENDED, listed
            return listed.step >= 1

        wait_until(lambda: trains(first, ours), "the first job trains", PATIENCE)
        wait_until(lambda: trains(second, theirs), "the second job trains", PATIENCE)
        for job, server, other in ((ours, one, two), (theirs, two, one)):
            (driver,) = drivers(job)
            assert cluster_of(server) in driver.cmdline()  # it was sent to its server's cluster
            assert cluster_of(other) not in driver.cmdline()
        for client, foreign in ((first, theirs), (second, ours)):
            with pytest.raises(NotFoundError):
                client.get(foreign)

        # What ends one leaves the other alone.
        first.cancel(ours, now=True)
        assert first.wait(ours, timeout_seconds=PATIENCE).state is JobState.CANCELLED
        one.end()
        reached = second.get(theirs).step
        wait_until(lambda: second.get(theirs).step > reached, "more steps", PATIENCE)
        assert [attempt.number for attempt in second.attempts(theirs)] == [1]
        second.cancel(theirs, now=True)
        assert second.wait(theirs, timeout_seconds=PATIENCE).state is JobState.CANCELLED


def test_two_jobs_one_cancelled_and_a_server_that_is_killed(server: Server) -> None:
    command = server.command
    spec = command.spec(SPEC)
    stays = answer(command, "submit", spec, "--set", f"steps={STEPS}")["job"]
    goes = answer(command, "submit", spec, "--set", "steps=100000", "--priority", "-1")["job"]
    follower = command.start("logs", stays, "-f", "-o", "json")

    def row(job: str) -> dict[str, Any]:
        rows = {row["job"]: row for row in answer(command, "list", "--name", "small")["jobs"]}
        assert set(rows) == {stays, goes}
        return rows[job]

    def runs(job: str, step: int = 1) -> bool:
        now = row(job)
        assert now["state"] in ("PENDING", "QUEUED", "STARTING", "RUNNING", "DEGRADED"), now
        return now["step"] >= step

    wait_until(lambda: runs(stays), "the first job trains", PATIENCE)
    server.kill()
    assert processes_with(f"runs/{stays}")  # the job continues without the server
    unreachable = command.run("list")
    assert unreachable.returncode == 5
    assert "Traceback" not in unreachable.stderr
    server.start()

    wait_until(lambda: runs(goes), "the second job trains", PATIENCE)
    assert processes_with(f"runs/{goes}")
    assert answer(command, "cancel", goes, "--wait")["state"] == "CANCELLED"
    assert processes_with(f"runs/{goes}") == []

    wait_until(lambda: row(stays)["state"] == "SUCCEEDED", "the first job succeeds", PATIENCE)
    assert row(goes)["state"] == "CANCELLED"
    facts = answer(command, "describe", stays)
    assert (facts["step"], facts["attempt"], len(facts["attempts"])) == (STEPS, 1, 1)
    assert facts["train"]["objective"] < facts["initial_objective"]
    (series,) = answer(command, "metrics", stays, "loss", "--points", "10000")["series"]
    assert series["steps"] == list(range(1, STEPS + 1))
    replayed = answer(command, "replay", stays, "--steps", "20")
    assert (replayed["job"], replayed["steps"], replayed["identical"]) == (stays, 20, True)

    out, errors = follower.communicate(timeout=PATIENCE)
    assert follower.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]
    written = {
        (line["role"], line["rank"], json.loads(line["text"])["timestamp"], line["text"])
        for line in lines
        if line["text"].startswith("{")
    }
    assert len(written) == len([line for line in lines if line["text"].startswith("{")])
    assert any("the attempt has succeeded" in line["text"] for line in lines)
    assert {"driver", "inverse_worker"} <= {line["role"] for line in lines}
    again = command.run("logs", stays, "-o", "json")
    assert sorted(again.stdout.splitlines()) == sorted(out.splitlines())

    server.process.send_signal(signal.SIGTERM)
    out, errors = server.process.communicate(timeout=PATIENCE)
    assert server.process.returncode == 0, errors
    assert "Traceback" not in errors
    home = str(command.folder)
    wait_until(lambda: not processes_with(home), "nothing of the cluster is left", PATIENCE)
