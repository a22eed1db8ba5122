"""Which statistics does an inverse worker get again that takes over from a dead one?

It starts from a copy of its predecessor's averages. The gradient workers keep the messages that are
newer than the newest copy, and send them again. See docs/algorithm.md#asynchrony.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kfac_dist.coordination.checks import check_interval

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class KeptMessage(Generic[T]):
    """A message to inverse worker `inverse_worker` with statistics of `layers` for a step."""

    step: int
    inverse_worker: int
    layers: tuple[str, ...]
    num_bytes: int
    content: T


class KeptStatistics(Generic[T]):
    """The messages of one gradient worker that may have to be sent again.

    They have at most `most_bytes`, or are those of a single step; the oldest steps go first.
    """

    def __init__(self, most_bytes: int) -> None:
        check_interval("most_bytes", most_bytes, 0)
        self._most_bytes = most_bytes
        self._messages: list[KeptMessage[T]] = []

    def add(self, message: KeptMessage[T]) -> None:
        """Keep a message; it replaces the one with the same layers of the same step."""
        key = (message.step, message.layers)
        self._messages = [m for m in self._messages if (m.step, m.layers) != key]
        self._messages.append(message)
        while self.num_bytes > self._most_bytes:
            oldest = min(kept.step for kept in self._messages)
            if oldest == message.step:
                return
            self._messages = [kept for kept in self._messages if kept.step != oldest]

    @property
    def num_bytes(self) -> int:
        """The size of all that is kept."""
        return sum(message.num_bytes for message in self._messages)

    def forget(self, inverse_worker: int, step: int) -> None:
        """Drop the messages up to `step`, which are in a copy of the averages."""
        self._messages = [
            message
            for message in self._messages
            if message.inverse_worker != inverse_worker or message.step > step
        ]

    def newer_than(self, inverse_worker: int, step: int) -> list[KeptMessage[T]]:
        """Return the messages to an inverse worker for later steps, in the order of the steps."""
        newer = [m for m in self._messages if m.inverse_worker == inverse_worker and m.step > step]
        return sorted(newer, key=lambda message: message.step)


@dataclass(frozen=True, kw_only=True)
class CatchUp:
    """The steps that an inverse worker gets again as a whole, and those that are lost."""

    steps: tuple[int, ...]
    lost: tuple[int, ...]


def plan_catch_up(
    due: Iterable[int],
    layers: Collection[str],
    sent: Sequence[Mapping[int, Collection[str]]],
    done_step: int,
) -> CatchUp:
    """Divide the steps that are not in the copy of the averages into whole and lost ones.

    Args:
        due: the steps with statistics after the copy, up to the last that anybody has sent.
        layers: all layers of the inverse worker.
        sent: for each gradient worker, the layers by step that the new worker has been sent.
        done_step: all have sent their part of the steps up to this one. Of a later step the rest
            is still to come.
    """
    steps: list[int] = []
    lost: list[int] = []
    for step in due:
        found = {layer for own in sent for layer in own.get(step, ())}
        is_whole = step > done_step or found.issuperset(layers)
        (steps if is_whole else lost).append(step)
    return CatchUp(steps=tuple(steps), lost=tuple(lost))
