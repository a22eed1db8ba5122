"""`kfac-dist validate` finds what is wrong with a task, its model and its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import KfacDist
from tests.tasks.specs import write_task


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text("name: own\ntask: mine.py:Line\nsteps: 1\nbatch_size: 2\n")
    return path


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("return nn.Linear(1, 1)", "raise LookupError('oh')", 1, "LookupError: oh"),
        ("return nn.Linear(1, 1)", "return nn.Linear(2, 1)", 1, "given inputs of shape (2, 1)"),
        ("return nn.Linear(1, 1)", "return nn.Linear(1, 3)", 1, "outputs have shape (2, 3)"),
        ("self.slope * x)", "x / (x - x[7]))", 1, "train data, target of case 7"),
        (
            "return TensorDataset(x, self.slope * x)",
            "return iter(())",
            1,
            "must return a data set with __len__",
        ),
        ("num_cases=12", "num_cases=1", 3, "batch_size"),
    ],
)
def test_a_broken_task_is_not_valid(
    kfac_dist: KfacDist, own: Path, old: str, new: str, code: int, says: str
) -> None:
    write_task(own.parent, (old, new))
    done = kfac_dist("validate", own)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    quick = kfac_dist("validate", own, "--spec-only")
    assert quick.code == 0
    assert "not checked: the task, its model and its data" in quick.err


def test_a_good_task_is_valid_and_what_is_not_checked_is_said(
    kfac_dist: KfacDist, own: Path
) -> None:
    write_task(own.parent)
    done = kfac_dist("validate", own)
    assert (done.code, "mine.py:Line" in done.out) == (0, True)
    assert "not checked: a training step" in done.err
