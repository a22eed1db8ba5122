"""A checkpoint resumes a run only if it has all that the run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_dist.errors import NotFoundError
from kfac_dist.runs import RunFolder
from tests.runs.samples import sample_spec
from workers.checkpoint import write_checkpoint
from workers.driver.checkpointing import ResumePoint, find_resume_point

ROLES = ("parameter_server", "factors", "buffers")
STATE = {"sampler": {"epoch": 1, "offset": 20}}


def resume_point(tmp_path: Path, roles: tuple[str, ...], state: dict[str, Any]) -> ResumePoint:
    with RunFolder.create(tmp_path / "run", sample_spec()) as folder:
        arrays = {role: {"x": np.ones(2)} for role in roles}
        write_checkpoint(folder.places.checkpoints, 5, arrays, state, keep=3)
        return find_resume_point(folder, 100, has_factors=True, has_buffers=True)


def test_a_whole_checkpoint_resumes(tmp_path: Path) -> None:
    point = resume_point(tmp_path, ROLES, STATE)
    assert (point.step, point.cursor.epoch, point.cursor.offset) == (5, 1, 20)
    assert set(point.averages) == set(point.buffers) == {"x"}


@pytest.mark.parametrize("role", ROLES)
def test_without_a_role_it_is_refused_by_name(tmp_path: Path, role: str) -> None:
    with pytest.raises(NotFoundError, match=rf"step-00000005 refused: .* has no role {role}"):
        resume_point(tmp_path, tuple(other for other in ROLES if other != role), STATE)


@pytest.mark.parametrize("state", [{}, {"sampler": 3}, {"sampler": {"epoch": 1}}])
def test_without_the_sampler_it_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(NotFoundError, match="has no state sampler with epoch and offset"):
        resume_point(tmp_path, ROLES, state)


def test_a_checkpoint_that_never_had_factors_says_so_and_resumes(tmp_path: Path) -> None:
    roles = ("parameter_server", "buffers")
    assert resume_point(tmp_path, roles, STATE | {"without_factors": True}).averages == {}
