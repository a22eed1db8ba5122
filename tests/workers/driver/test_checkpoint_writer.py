"""Checkpoints are written beside the training; what goes wrong surfaces between two steps."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.errors import JobFailedError
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from tests.waiting import wait_until
from workers.checkpoint import load_newest
from workers.driver.checkpoint_writer import CheckpointContent, CheckpointWriter
from workers.exchange.arrays import Arrays


def content(step: int, gate: threading.Event | None = None) -> CheckpointContent:
    """What is written once `gate` is open."""

    def roles() -> dict[str, Arrays]:
        assert gate is None or gate.wait(20)
        return {"parameter_server": {"x": np.full(3, step)}}

    return CheckpointContent(step=step, roles=roles, state={})


@pytest.fixture
def told() -> list[int]:
    return []


def test_the_caller_goes_on_and_is_told_once_it_is_on_disk(tmp_path: Path, told: list[int]) -> None:
    folder, gate = tmp_path / "checkpoints", threading.Event()
    writer = CheckpointWriter(folder, 2, told.append)
    writer.start(content(5, gate))
    writer.look()
    assert (told, list_checkpoints(folder)) == ([], ())
    gate.set()
    wait_until(lambda: writer.look() or told, "a checkpoint")
    loaded = load_newest(folder)
    assert loaded is not None
    assert (told, loaded.roles["parameter_server"]["x"].tolist()) == ([5], [5, 5, 5])


def test_the_next_one_waits_and_old_ones_are_pruned(tmp_path: Path, told: list[int]) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, told.append)
    for step in (1, 2, 3):
        writer.start(content(step))
        writer.finish(lambda: None)
    assert told == [1, 2, 3]
    assert [info.step for info in list_checkpoints(tmp_path / "checkpoints")] == [3, 2]


def test_a_folder_that_is_gone_fails_the_job_at_the_next_look(
    tmp_path: Path, told: list[int]
) -> None:
    writer = CheckpointWriter(tmp_path / "gone" / "checkpoints", 2, told.append)
    writer.start(content(1))
    with pytest.raises(JobFailedError, match="checkpoint of step 1 cannot be written") as caught:
        writer.finish(lambda: None)
    assert caught.value.reason == "checkpoint_not_written"
    writer.finish(lambda: None)  # it is told once
    assert told == []


def test_an_interrupt_ends_the_wait(tmp_path: Path, told: list[int]) -> None:
    gate = threading.Event()
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, told.append)
    writer.start(content(1, gate))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.finish(interrupted)
    gate.set()
    writer.wait(20)
    assert [info.step for info in list_checkpoints(tmp_path / "checkpoints")] == [1]
