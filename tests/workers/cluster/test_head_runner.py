"""The runner of an embedded cluster follows it from one life to the next, without Ray here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import AttemptKey, Remnant, RunnerState, RunnerStatus
from kfac_dist.errors import UnreachableError
from kfac_dist.runs.lock import FolderLock
from tests.waiting import wait_until
from workers.cluster import head_runner
from workers.cluster.head import Head, end_head, was_ended
from workers.cluster.head_runner import HeadJobRunner
from workers.cluster.leftovers import MARK, Traces

KEY = AttemptKey("job-7", 1)
ROOM = Room(num_cpus=2, num_gpus=0, num_inverse_slots=2)


class KnowingRunner:
    """The runner on one cluster: it knows the attempts that were submitted to it."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.known: list[AttemptKey] = []

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        self.known.append(key)

    def stop(self, key: AttemptKey) -> None: ...

    def kill(self, key: AttemptKey) -> None: ...

    def status(self, key: AttemptKey) -> RunnerStatus:
        known = key in self.known
        return RunnerStatus(state=RunnerState.RUNNING if known else RunnerState.UNKNOWN)

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        return {key: self.status(key) for key in self.known}

    def resources(self) -> Room:
        return ROOM

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        return []


class Plant:
    """A home whose cluster this process pretends to keep."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "ray"
        self.folder.mkdir()
        self.runners: list[KnowingRunner] = []
        self.num_starts = 0
        self.fails = False
        self.go = threading.Event()
        self.go.set()
        self.lock: FolderLock | None = None
        self.runner = HeadJobRunner(home, start=self.start, runner_of=self.runner_of)

    def start(self, home: Path) -> Head:
        assert self.go.wait(30)
        self.num_starts += 1
        if self.fails:
            raise UnreachableError("Ray has no port")
        self.lock = FolderLock(self.folder)
        head = Head(
            gcs_address=f"127.0.0.1:{self.num_starts}",
            jobs_url="http://127.0.0.1:1",
            token_path=str(self.folder / "token"),
            pid=os.getpid(),
        )
        (self.folder / "head.json").write_text(json.dumps(asdict(head)))
        return head

    def runner_of(self, head: Head, traces: Traces) -> KnowingRunner:
        self.runners.append(KnowingRunner(head))
        return self.runners[-1]

    def die(self) -> None:
        """End as a keeper that was killed: its file is left."""
        assert self.lock is not None
        self.lock.release()


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    made = Plant(tmp_path)
    made.start(tmp_path)
    yield made
    made.go.set()
    made.runner.close()
    made.die()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the attempt."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    made = subprocess.Popen(command, env=os.environ | {MARK: KEY.submission_id})
    yield made
    made.kill()
    made.wait()


def test_a_dead_cluster_is_started_again_and_taken_over(plant: Plant, tmp_path: Path) -> None:
    plant.runner.submit(KEY, tmp_path)
    assert plant.runner.status(KEY).state is RunnerState.RUNNING
    plant.go.clear()
    plant.die()
    with pytest.raises(UnreachableError, match="it is being started again"):
        plant.runner.resources()
    with pytest.raises(UnreachableError, match="it is being started again"):
        plant.runner.submit(KEY, tmp_path)
    status = plant.runner.status(KEY)
    assert (status.state, status.is_over) == (RunnerState.FAILED, True)
    assert status.message == "the Ray cluster that it ran on has ended"
    assert plant.runner.list() == {}
    plant.go.set()
    wait_until(lambda: plant.num_starts == 2, "the second start")
    wait_until(lambda: plant.runner.status(KEY).state is RunnerState.UNKNOWN, "the new cluster")
    assert plant.runner.resources() == ROOM
    assert [runner.head.gcs_address for runner in plant.runners] == ["127.0.0.1:1", "127.0.0.1:2"]


def test_a_cluster_that_another_program_started_is_taken_over(plant: Plant) -> None:
    assert plant.runner.resources() == ROOM
    plant.die()
    plant.start(plant.home)
    assert plant.runner.resources() == ROOM
    assert len(plant.runners) == 2  # with the new addresses and the new secret
    assert plant.num_starts == 2


def test_an_attempt_is_over_only_when_its_processes_are(
    plant: Plant, process: subprocess.Popen[bytes]
) -> None:
    plant.go.clear()
    plant.die()
    assert plant.runner.status(KEY).state is RunnerState.RUNNING
    (remnant,) = plant.runner.remains(KEY)
    assert str(process.pid) in remnant.description
    plant.runner.stop(KEY)
    process.wait(10)
    assert plant.runner.status(KEY).is_over
    assert plant.runner.remains(KEY) == []


def test_a_driver_of_the_cluster_before_is_ended_first(
    plant: Plant, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    plant.runner.submit(KEY, tmp_path)
    assert process.wait(10) == -9
    plant.runner.submit(KEY, tmp_path)


def test_a_cluster_that_a_user_ended_is_not_started_again(plant: Plant) -> None:
    plant.die()
    assert not end_head(plant.home)
    assert was_ended(plant.home)
    with pytest.raises(UnreachableError, match="kfac-dist cluster up starts it again"):
        plant.runner.resources()
    assert plant.runner.status(KEY).is_over
    assert plant.num_starts == 1


def test_a_start_that_fails_says_why_and_is_tried_again(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.die()
    plant.fails = True
    with pytest.raises(UnreachableError):
        plant.runner.resources()

    def says_why() -> bool:
        with pytest.raises(UnreachableError) as caught:
            plant.runner.resources()
        return caught.value.message.endswith("(last try: Ray has no port)")

    wait_until(says_why, "the reason")
    assert plant.num_starts == 2  # there is a pause before the next
    plant.fails = False
    monkeypatch.setattr(head_runner.time, "monotonic", lambda: 1e12)
    with pytest.raises(UnreachableError):
        plant.runner.resources()
    monkeypatch.undo()
    wait_until(lambda: plant.num_starts == 3, "the next try")


def test_after_the_end_no_cluster_is_started(plant: Plant) -> None:
    plant.runner.close()
    plant.die()
    with pytest.raises(UnreachableError):
        plant.runner.resources()
    assert plant.num_starts == 1
