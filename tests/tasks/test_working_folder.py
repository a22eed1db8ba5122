"""User code runs in the folder of its specification, wherever the process was started."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.tasks import enter_working_folder, load_task, working_folder
from tests.tasks.specs import spec, write_task


def test_the_folder_is_left_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    with working_folder(inner):
        assert Path.cwd() == inner
    assert Path.cwd() == tmp_path
    with working_folder(tmp_path / "missing"):
        assert Path.cwd() == tmp_path


def test_a_worker_stays_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    enter_working_folder(tmp_path / "missing", otherwise=tmp_path)
    assert Path.cwd() == tmp_path
    (tmp_path / "code").mkdir()
    enter_working_folder(tmp_path / "code", otherwise=tmp_path)
    assert Path.cwd() == tmp_path / "code"


def test_a_task_in_a_subfolder_imports_from_the_folder_of_the_specification(
    tmp_path: Path,
) -> None:
    (tmp_path / "beside_the_specification.py").touch()
    more = "\nimport beside_the_specification\n"
    write_task(tmp_path, name="inner/mine.py", more=more)
    load_task(spec("inner/mine.py:Line"), tmp_path)
