from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config import load_spec
from tests.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_specification(path: Path) -> None:
    assert load_spec(path).name.replace("-", "_") == path.stem
