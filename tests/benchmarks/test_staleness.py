"""Staleness against progress: a run of seconds from the command line, and its columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script finds its modules beside itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_all_variants_are_compared_with_the_synchronous_run(tmp_path: Path) -> None:
    damping = "optimizer.damping.initial=150"
    small = ("data.limit=200", "batch_size=100", "task_args.hidden=[20,5]", damping)
    overrides = [word for override in small for word in ("--set", override)]
    script = str(ROOT / "benchmarks/staleness.py")
    done = subprocess.run(
        [sys.executable, script, "--short", "--out", str(tmp_path), *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "staleness.json").read_text()) == result
    (run,) = result["runs"]
    synchronous = run["objective"]["synchronous"]
    for row in result["variants"]:
        name = row["variant"]
        expected = run["objective"][name] / synchronous
        assert row["over_synchronous"]["mean"] == pytest.approx(expected, abs=1e-4)
        assert run["curves"][name][-1]["loss"] < run["curves"][name][0]["loss"]
        assert f"| {name} |" in (tmp_path / "staleness.md").read_text()
    assert len({run["objective"][row["variant"]] for row in result["variants"]}) == 3


def test_staleness_is_that_of_the_script() -> None:
    from staleness import Variant

    from kfac_dist.config import kfac_settings

    settings = kfac_settings({"inverse_update_period": 4, "gamma": {"adapt_period": None}})
    # Refreshes in steps 1, 2, 3, 4, 8: the ages are 0, 0, 0, 0, 1, 2, 3, 0, 1, 2.
    assert Variant(0, 0).mean_staleness(settings, 10) == pytest.approx(0.9)
    # Two steps late: 0, 1, 2, 2, 2, 2, 3, 4, 5, 2.
    assert Variant(2, 0).mean_staleness(settings, 10) == pytest.approx(2.3)
    # Synchronous until step 4, whose version stays until that of step 8 is two steps old.
    assert Variant(2, 4).mean_staleness(settings, 10) == pytest.approx((1 + 2 + 3 + 4 + 5 + 2) / 10)
