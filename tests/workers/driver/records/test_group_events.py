"""Changes of the group as events, for people and for replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kfac_dist.runs import RunFolder
from tests.runs.samples import sample_spec
from workers.driver.crew.failures import Member
from workers.driver.crew.healing import StepInHand
from workers.driver.crew.losses import GroupChange
from workers.driver.records.group_events import record_change
from workers.driver.records.journal import JobJournal


@pytest.mark.parametrize(
    ("changes", "message", "severity"),
    [
        (
            {"kind": "member_died", "is_degraded": True, "message": "1 of 2 are there"},
            "gradient worker 1 (pid 7) is lost after step 4; group 2 has 1 gradient worker and "
            "3 shards: 1 of 2 are there",
            "warning",
        ),
        (
            {"kind": "member_joined", "num_workers": 2},
            "gradient worker 1 (pid 7) has joined after step 4; group 2 has 2 gradient workers "
            "and 3 shards",
            "info",
        ),
        ({"kind": "member_left"}, "gradient worker 1 (pid 7) has left after step 4", "info"),
    ],
)
def test_an_event_says_who_and_what_a_replay_needs(
    tmp_path: Path, changes: dict[str, Any], message: str, severity: str
) -> None:
    values = {
        "member": Member(role="gradient_worker", rank=1, pid=7),
        "step": 4,
        "epoch": 2,
        "num_workers": 1,
        "num_shards": 3,
        "is_degraded": False,
        "in_hand": StepInHand(begun=True),
        "loses_buffers": False,
        "message": "",
    }
    with RunFolder.create(tmp_path / "run", sample_spec()) as folder:
        shown = record_change(JobJournal(folder, 1), GroupChange(**(values | changes)))
        (event,) = folder.read_events()
    assert event.message == shown
    assert shown.startswith(message)
    assert (event.kind, event.severity) == (changes["kind"], severity)
    assert (event.role, event.rank, event.details["pid"]) == ("gradient_worker", 1, 7)
    assert event.details["after_step"] == 4
    assert event.details["repeats_step"]
    assert not event.details["undoes_step"]
