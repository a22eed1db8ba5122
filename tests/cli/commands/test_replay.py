"""`replay` before it starts any worker: what it refuses, and with which message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_dist.runs import Event, RunFolder
from tests.cli.conftest import KfacDist
from tests.runs.samples import sample_record, sample_spec


def make_run(path: Path, num_steps: int, *events: Event) -> Path:
    with RunFolder.create(path, sample_spec(steps=9)) as folder:
        for step in range(1, num_steps + 1):
            gammas = {"inverse_gammas": {"a": [1.0]}} if step == 1 else {}
            folder.append_metrics(sample_record(step, inverse_version_step={"a": 1}, **gammas))
        for event in events:
            folder.append_event(event)
    return path


def test_a_missing_folder_and_a_folder_without_a_run_are_exit_code_4(
    kfac_dist: KfacDist, tmp_path: Path
) -> None:
    done = kfac_dist("replay", tmp_path / "gone")
    assert (done.code, done.out) == (4, "")
    assert done.err == f"error: {tmp_path}/gone: no such folder; give the folder of a run\n"
    done = kfac_dist("replay", tmp_path, "-o", "json")
    assert done.code == 4
    assert "has no job.json" in json.loads(done.err)["error"]["message"]


def test_a_run_without_steps_has_nothing_to_replay(kfac_dist: KfacDist, tmp_path: Path) -> None:
    done = kfac_dist("replay", make_run(tmp_path / "run", 0))
    assert (done.code, done.out) == (4, "")
    assert "has no step to replay" in done.err


def test_a_run_that_lost_its_first_step_is_a_conflict(kfac_dist: KfacDist, tmp_path: Path) -> None:
    death = Event(kind="inverse_worker_died", message="died", step=1, rank=2)
    done = kfac_dist("replay", make_run(tmp_path / "run", 3, death))
    assert (done.code, done.out) == (9, "")
    assert "no step can be replayed: inverse worker 2 died in step 1" in done.err


def test_an_occupied_folder_is_refused_with_advice(kfac_dist: KfacDist, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    before = (run / "metrics.jsonl").read_bytes()
    done = kfac_dist("replay", run, "--run-dir", run)
    assert (done.code, done.out) == (9, "")
    assert f"{run}: this folder holds a run" in done.err
    assert "--resume" not in done.err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("steps", ["0", "-3", "all"])
def test_a_number_of_steps_is_checked(kfac_dist: KfacDist, tmp_path: Path, steps: str) -> None:
    done = kfac_dist("replay", make_run(tmp_path / "run", 3), "--steps", steps)
    assert done.code == 2
    assert "--steps" in done.err
