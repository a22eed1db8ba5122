"""A run folder is mirrored while its job runs, and comes back from there whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.errors import UnreachableError
from kfac_dist.runs import RunFolder
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from kfac_dist.runs.transfer import storage
from kfac_dist.runs.transfer.remote import RemoteFolder
from kfac_dist.runs.transfer.restore import restore_run
from kfac_dist.runs.transfer.storage import StorageMirror
from tests.runs.samples import sample_record, sample_run
from tests.runs.transfer.local_s3 import s3_server
from tests.waiting import wait_until
from workers.checkpoint import load_newest, write_checkpoint

Said = list[tuple[str, str]]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield url


@pytest.fixture
def place() -> RemoteFolder:
    return RemoteFolder(f"memory:///{secrets.token_hex(4)}")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(storage, "_PAUSE_RATIO", 0)
    with sample_run(tmp_path / "run", steps=3) as folder:
        folder.places.log("gradient_worker", 0).write_text('{"event": "built"}\n')
        yield folder


def checkpoint(run: RunFolder, step: int, keep: int = 3) -> Path:
    arrays = {"parameters": np.full(1000, float(step))}
    return write_checkpoint(run.places.checkpoints, step, {"parameter_server": arrays}, {}, keep)


def started(run: RunFolder, place: RemoteFolder, said: Said, attempt: int = 1) -> StorageMirror:
    mirror = StorageMirror(run.places, place, attempt, lambda *what: said.append(what))
    mirror.start()
    return mirror


def stored_steps(place: RemoteFolder) -> set[str]:
    return {n.split("/")[1] for n in place.files() if n.endswith("manifest.sha256")}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("where", ["memory", "s3", "file"])
def test_a_run_is_mirrored_while_it_goes_on_and_comes_back_equal(
    where: str, run: RunFolder, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = {"memory": "memory://", "file": f"file://{tmp_path}/storage"}.get(where)
    place = RemoteFolder(f"{url or request.getfixturevalue('s3')}/{secrets.token_hex(4)}")
    said: Said = []
    mirror = started(run, place, said)
    for step in (4, 8, 12):
        run.append_metrics(sample_record(step))
        checkpoint(run, step, keep=2)
        wait_until(lambda step=step: f"step-{step:08d}" in stored_steps(place), "the upload")
    assert mirror.finish(20) == []
    assert said == []
    assert stored_steps(place) == {"step-00000008", "step-00000012"}
    back = tmp_path / "back"
    assert restore_run(place, back) == ()
    shutil.rmtree(run.places.checkpoints / "step-00000008")  # only the newest is fetched
    before = contents(run.path)
    logs = {name for name in before if name.startswith("logs/")}
    assert contents(back) == {
        name: content
        for name, content in before.items()
        if name not in logs | {"summary.json", "report.html"}
    }
    assert logs == {"logs/gradient_worker-0.log"}
    assert logs <= set(place.files())
    again = RunFolder.resume(back, run.read_spec())
    assert again.read_job().attempt == 1
    again.close()


def test_no_run_comes_back_from_an_empty_storage(place: RemoteFolder, tmp_path: Path) -> None:
    assert restore_run(place, tmp_path / "back") is None
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("torn", ["no_seal", "other_bytes", "file_missing"])
def test_the_newest_whole_checkpoint_counts(
    torn: str, run: RunFolder, place: RemoteFolder, tmp_path: Path
) -> None:
    mirror = started(run, place, [])
    checkpoint(run, 2)
    wait_until(lambda: len(stored_steps(place)) == 1, "the first upload")
    checkpoint(run, 3)
    assert mirror.finish(20) == []
    newest = "checkpoints/step-00000003"
    if torn == "no_seal":
        place.remove(f"{newest}/manifest.sha256")
    elif torn == "other_bytes":
        (tmp_path / "other").write_bytes(b"something else")
        place.put(tmp_path / "other", f"{newest}/parameter_server.safetensors")
    else:
        place.remove(f"{newest}/parameter_server.safetensors")
    refused = restore_run(place, tmp_path / "back")
    assert refused is not None
    assert [message.partition(" in ")[0] for message in refused] == (
        [] if torn == "no_seal" else ["checkpoint step-00000003"]
    )
    loaded = load_newest(tmp_path / "back/checkpoints")
    assert loaded is not None
    assert loaded.step == 2


def test_a_storage_that_is_away_is_told_once_and_gets_everything_when_it_is_back(
    run: RunFolder, place: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, is_away, tries = RemoteFolder.put, True, []

    def refuse(self: RemoteFolder, source: Path, name: str) -> None:
        tries.append(name)
        if is_away:
            raise UnreachableError(f"{self.url}: cannot write {name}: no route")
        put(self, source, name)

    monkeypatch.setattr(RemoteFolder, "put", refuse)
    said: Said = []
    mirror = started(run, place, said)
    checkpoint(run, 3)
    wait_until(lambda: len(tries) > 3, "tries")
    assert [kind for kind, _ in said] == ["storage_unreachable"]
    assert said[0][1].startswith(f"{place.url}: cannot write spec.yaml: no route; it is tried")
    is_away = False
    assert mirror.finish(20) == []
    assert [kind for kind, _ in said] == ["storage_unreachable", "storage_reached"]
    assert stored_steps(place) == {"step-00000003"}


def test_what_is_not_up_in_time_is_named(
    run: RunFolder, place: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RemoteFolder, source: Path, name: str) -> None:
        raise UnreachableError("no route")

    monkeypatch.setattr(RemoteFolder, "put", refuse)
    mirror = started(run, place, [])
    checkpoint(run, 3)
    missing = mirror.finish(0.3)
    assert {"job.json", "metrics.jsonl", "checkpoints/step-00000003"} <= set(missing)


def test_a_checkpoint_that_is_pruned_during_its_upload_still_arrives(
    run: RunFolder, place: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = RemoteFolder.put

    def prune_then_put(self: RemoteFolder, source: Path, name: str) -> None:
        if name.endswith("parameter_server.safetensors"):
            for info in list_checkpoints(run.places.checkpoints):
                shutil.rmtree(info.path)
        put(self, source, name)

    monkeypatch.setattr(RemoteFolder, "put", prune_then_put)
    checkpoint(run, 2)
    mirror = started(run, place, [])
    wait_until(lambda: stored_steps(place) == {"step-00000002"}, "the upload")
    assert mirror.finish(20) == []


def test_an_attempt_that_was_replaced_leaves_the_storage_to_its_successor(
    run: RunFolder, place: RemoteFolder
) -> None:
    said: Said = []
    first = started(run, place, said)
    wait_until(lambda: place.read("job.json"), "the upload")
    second = run.update_job(attempt=2, state="RUNNING")
    newer = started(run, place, said, attempt=2)
    wait_until(lambda: b'"attempt": 2' in (place.read("job.json") or b""), "the successor")
    wait_until(lambda: said, "the first to notice")
    assert [kind for kind, _ in said] == ["storage_taken_over"]
    assert newer.finish(20) == []
    run.update_job(attempt=1, state="CANCELLED")
    first.finish(1)
    assert f'"state": "{second.state}"'.encode() in (place.read("job.json") or b"")
