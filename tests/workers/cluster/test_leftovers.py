"""Exactly the processes and shared memory of an attempt are found by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from workers.cluster.leftovers import (
    MARK,
    ended_with_block,
    kill_processes,
    marking,
    processes_of,
    shared_memory_of,
)

HOLDER = """\
import mmap, os, subprocess, sys, time
path = f"/dev/shm/kfac-dist-test-{os.getpid()}"
with open(path, "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(path, child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[tuple[int, int, Path]]:
    """A process of attempt job-1-a1, its child, and its named shared memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=os.environ | {MARK: "job-1-a1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        path, child = process.stdout.readline().split()
        memory = Path(path)
        yield process.pid, int(child), memory
        kill_processes("job-1-a1")
        memory.unlink(missing_ok=True)


def test_children_and_memory_are_found_and_ended(holder: tuple[int, int, Path]) -> None:
    pid, child, memory = holder
    assert {process.pid for process in processes_of("job-1-a1")} == {pid, child}
    assert set(shared_memory_of("job-1-a1")) == {memory}
    assert processes_of("job-1-a11") == []
    kill_processes("job-1-a1")
    wait_until(lambda: processes_of("job-1-a1") == [], "the end of both")
    assert list(shared_memory_of("job-1-a1")) == []


def test_what_a_task_starts_in_the_driver_ends_with_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(MARK, raising=False)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    bystander = subprocess.Popen(command)
    with ended_with_block() as attempt, marking(attempt):
        started = subprocess.Popen(command)
        wait_until(lambda: processes_of(attempt), "the mark")
    assert started.wait(timeout=10) == -9
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert MARK not in os.environ


def test_an_attempt_of_a_server_is_left_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "job-1-a1")
    with ended_with_block() as attempt, marking(attempt):
        assert attempt == ""
        assert os.environ[MARK] == "job-1-a1"
