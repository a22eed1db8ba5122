from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kfac_dist.cli.app import run

SPEC = """\
name: digits
task: classifier
steps: 5
batch_size: 100
"""


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


KfacDist = Callable[..., Done]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("KFAC_DIST_HOME", str(folder))
    monkeypatch.delenv("KFAC_DIST_DATA", raising=False)
    return folder


@pytest.fixture
def kfac_dist(home: Path, capsys: pytest.CaptureFixture[str]) -> KfacDist:
    """Runs a command line in this process."""

    def call(*arguments: object) -> Done:
        code = run([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "digits.yaml"
    path.write_text(SPEC)
    return path
