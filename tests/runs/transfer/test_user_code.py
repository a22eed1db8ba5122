"""The code that is sent with a job has the file of its task, or the job is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.errors import InvalidSpecError
from kfac_dist.runs.transfer.user_code import code_of


def spec(task: str) -> JobSpec:
    return parse_spec({"name": "own", "task": task, "steps": 1, "batch_size": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "code"
    (path / "pkg").mkdir(parents=True)
    (path / "task.py").write_text("class Task: pass\n")
    (path / "pkg/__init__.py").touch()
    return path


@pytest.mark.parametrize("task", ["task.py:Task", "task:Task", "pkg:Task", "pkg.inner:Task"])
def test_the_folder_is_sent_if_the_task_is_in_it(folder: Path, task: str) -> None:
    code = code_of(spec(task), folder)
    assert code is not None
    assert [file.name for file in code.contents.packed] == ["task.py", "pkg/__init__.py"]


@pytest.mark.parametrize("task", ["classifier", "numpy.random:Task"])
def test_other_tasks_need_no_code(folder: Path, task: str) -> None:
    assert code_of(spec(task), folder) is None


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("link.py:Task", r"link\.py: a link to task\.py"),
        (".hidden.py:Task", r"\.hidden\.py: hidden"),
        ("venv/task.py:Task", "venv/: venv/ is left out by default"),
        ("ignored.py:Task", "line 1 of .kfacdistignore: ignored.*"),
        ("ignored:Task", "line 1 of .kfacdistignore: ignored.*"),
        ("../code/task.py:Task", r"relative to .*: task\.py"),
        ("{folder}/task.py:Task", r"relative to .*: task\.py"),
    ],
)
def test_a_task_that_would_not_be_sent_is_refused(folder: Path, task: str, says: str) -> None:
    (folder / "link.py").symlink_to("task.py")
    (folder / "venv").mkdir()
    for name in (".hidden.py", "ignored.py", "venv/task.py"):
        (folder / name).touch()
    (folder / ".kfacdistignore").write_text("ignored.*\n")
    with pytest.raises(InvalidSpecError, match=says):
        code_of(spec(task.format(folder=folder)), folder)
