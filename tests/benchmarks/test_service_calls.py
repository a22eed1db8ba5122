"""Calls to the control plane: a short run from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def test_each_call_is_next_to_an_empty_one(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks/service_calls.py")
    done = subprocess.run(
        [sys.executable, script, "--short", "--jobs", "60", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "service_calls.json").read_text())
    assert result == json.loads(done.stdout)
    assert result["num_jobs"] == 60
    empty, *calls = result["calls"]
    assert (empty["call"], empty["over_empty_call"]) == ("empty call", 1.0)
    assert [call["call"] for call in calls] == [
        "first page of 50 jobs",
        "60 jobs in pages of 200",
        "60 jobs in one answer",
    ]
    for call in calls:
        assert call["best_ms"] <= call["median_ms"] <= call["worst_ms"]
        assert f"| {call['call']} |" in (tmp_path / "service_calls.md").read_text()
