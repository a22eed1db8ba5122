"""A run that exists only in its storage is resumed elsewhere; nothing there is overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kfac_dist.config import parse_spec
from kfac_dist.errors import ConflictError, NotFoundError, UnreachableError, UsageError
from kfac_dist.runs import RunIdentity
from kfac_dist.runs.transfer import storage
from kfac_dist.runs.transfer.remote import RemoteFolder
from tests.runs.samples import sample_spec
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from workers.driver.stored_run import open_run, storage_of


def test_a_run_is_resumed_on_a_machine_that_has_only_its_storage(
    processes: None, tmp_path: Path
) -> None:
    jobs = Jobs(tmp_path)
    spec = line_spec(storage=f"file://{tmp_path}/storage")
    summary = jobs.run(parse_spec(spec | {"steps": 8}))
    assert summary.not_stored == []
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConflictError, match="holds the run of job line-"):
        jobs.run(parse_spec(spec), run_dir="elsewhere")
    resumed = jobs.run(parse_spec(spec), run_dir="elsewhere", resume=True)
    assert (resumed.job, resumed.state, resumed.step) == (summary.job, "SUCCEEDED", 12)
    assert jobs.event("restored").message.endswith(f"fetched from file://{tmp_path}/storage/line")
    assert "from the checkpoint of step 8" in jobs.event("resumed").message
    assert [r.step for r in jobs.run_folder("elsewhere").read_metrics()] == list(range(1, 13))
    stored = RemoteFolder(f"file://{tmp_path}/storage/line").files()
    assert "checkpoints/step-00000012/manifest.sha256" in stored
    assert {"logs/gradient_worker-0.log", "logs/gradient_worker-0.a2.log"} <= set(stored)
    assert {"summary.json", "report.html", "job.json"} <= set(stored)


def test_a_job_trains_without_its_storage_and_says_what_is_missing(
    processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PATIENCE_SECONDS", 0.1)
    (tmp_path / "file").write_text("a file has no folders below it")
    jobs = Jobs(tmp_path)
    summary = jobs.run(parse_spec(line_spec(steps=4, storage=f"file://{tmp_path}/file/below")))
    assert summary.state == "SUCCEEDED"
    assert {"job.json", "checkpoints/step-00000004"} <= set(summary.not_stored)
    assert jobs.run_folder().read_summary() == summary
    (event,) = [event for event in jobs.events if event.kind == "storage_unreachable"]
    assert (event.severity, event.message.startswith("file://")) == ("warning", True)
    assert "not_stored" in jobs.kinds()


def test_an_attempt_of_a_server_starts_over_if_nothing_was_stored(tmp_path: Path) -> None:
    spec = sample_spec(storage=f"file://{tmp_path}/storage")
    identity = RunIdentity(job="j1", attempt=2)
    place = storage_of(spec, identity)
    assert place is not None
    assert place.url == f"file://{tmp_path}/storage/j1"
    opened = open_run(tmp_path / "run", spec, place, resume=True, identity=identity)
    with opened.folder as folder:
        assert (opened.resumes, folder.read_job().attempt) == (False, 2)
    with pytest.raises(NotFoundError, match="no run to resume, neither in"):
        open_run(tmp_path / "other", spec, place, resume=True, identity=None)


def test_a_storage_that_is_away_stops_only_a_run_that_must_come_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RemoteFolder, name: str) -> None:
        raise UnreachableError("no route")

    monkeypatch.setattr(RemoteFolder, "read", refuse)
    spec = sample_spec(storage="memory:///x")
    place = storage_of(spec, None)
    with pytest.raises(UnreachableError, match="no route"):
        open_run(tmp_path / "run", spec, place, resume=True, identity=None)
    opened = open_run(tmp_path / "run", spec, place, resume=False, identity=None)
    opened.folder.close()
    (said,) = opened.events
    assert said == ("storage_unreachable", "no route; it is tried again until the job ends")


def test_a_storage_without_a_library_keeps_a_job_from_starting(tmp_path: Path) -> None:
    spec = sample_spec(storage="not-known://bucket/x")
    with pytest.raises(UsageError, match="not-known"):
        open_run(tmp_path / "run", spec, storage_of(spec, None), resume=False, identity=None)
    assert not (tmp_path / "run").exists()
