"""Writes changes of the group into the journal, for people and for replays."""

from __future__ import annotations

from workers.driver.crew.deaths import named
from workers.driver.crew.losses import GroupChange
from workers.driver.records.journal import JobJournal

_VERBS = {
    "member_died": "is lost",
    "member_left": "has left",
    "member_joined": "has joined",
}


def record_change(journal: JobJournal, change: GroupChange) -> str:
    """Write the event of a change, and return its message."""
    member = named(str(change.member), change.member.pid or None)
    message = (
        f"{member} {_VERBS[change.kind]} after step {change.step}; group {change.epoch} has "
        f"{_count(change.num_workers, 'gradient worker')} and {_count(change.num_shards, 'shard')}"
    )
    if change.message:
        message += f": {change.message}"
    journal.event(
        change.kind,
        message,
        severity="warning" if change.kind == "member_died" or change.is_degraded else "info",
        role=change.member.role,
        rank=change.member.rank,
        pid=change.member.pid or None,
        after_step=change.step,
        epoch=change.epoch,
        gradient_workers=change.num_workers,
        shards=change.num_shards,
        repeats_step=change.in_hand.begun,
        undoes_step=change.in_hand.undone,
        loses_buffers=change.loses_buffers,
    )
    return message


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
