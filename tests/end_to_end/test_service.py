"""The control plane as a user types it: a server, two jobs, and a kill -9 in the middle."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.command import SPEC, CommandLine
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)
PATIENCE = 400.0  # seconds for what takes tens on a machine of one's own
STEPS = 300


class Server:
    """`kfac-dist serve` in the background, always at the same port."""

    def __init__(self, command: CommandLine) -> None:
        self.command = command
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.process = self.command.start(
            "serve", "--listen", f"127.0.0.1:{self.port}", "-o", "json"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        assert json.loads(line)["address"] == f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: a Ray cluster takes its time. The last test ends it."""
    running = Server(CommandLine(tmp_path_factory.mktemp("service")))
    yield running
    running.command.run("cluster", "down", "--force", seconds=PATIENCE)
    for process in running.command.started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def answer(command: CommandLine, *arguments: str | Path) -> dict[str, Any]:
    done = command.run(*arguments, "-o", "json", seconds=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processes_with(text: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if text in line:
            found.append(line)
    return found


def test_a_failing_task_is_explained_and_can_be_tried_again(server: Server) -> None:
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


def test_a_second_server_of_the_same_home_is_refused(server: Server) -> None:
    done = server.command.run("serve", "--listen", "127.0.0.1:0")
    assert done.returncode == 9
    assert "a server works with this home already" in done.stderr


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
    assert processes_with(f"runs/{stays}")  # it went on
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
