"""No process exchanges more with many gradient workers than with two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bytes_by_role(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module: it finds its own beside itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bytes_by_role

    return bytes_by_role


def test_the_bytes_of_every_role_are_those_of_the_table(bytes_by_role: Any, tmp_path: Path) -> None:
    rows = [bytes_by_role.count(count, tmp_path) for count in (1, 2, 4, 8, 16)]
    assert [row.shards for row in rows] == [1, 1, 4, 8, 16]
    for row in rows:
        expected = row.expected()
        assert row.found() == {
            name: pytest.approx(value, rel=0.1) for name, value in expected.items()
        }, row.gradient_workers
    two, *more = rows[1:]
    for row in more:
        assert row.found()["shard_received"] <= 1.1 * row.parameters
        # A worker's own shard included, no process exchanges more than twice what two did.
        for way in ("sent", "received"):
            process = row.found()[f"worker_{way}"] + row.found()[f"shard_{way}"]
            assert process <= 2.0 * two.found()[f"worker_{way}"]
        assert row.inverse_workers == two.inverse_workers == row.factors


def test_the_table_says_what_was_counted(bytes_by_role: Any, tmp_path: Path) -> None:
    row = bytes_by_role.count(2, tmp_path)
    text = bytes_by_role.markdown([row])
    assert f"| 2 | 1 | {row.worker.sent / row.parameters:.2f} (" in text
    assert "| 1.00 (1.00) |" in text
