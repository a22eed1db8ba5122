"""Statistics are applied exactly once: who has sent what (algorithm.md section 13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from kfac_dist.coordination.checks import check_interval

Receipt = Literal["accepted", "duplicate", "late"]


class StatisticsLedger:
    """The statistics messages of all gradient workers for one inverse worker.

    The statistics of a step are the sum over all ranks, so a step is used when it is whole. Each
    rank sends its steps in order: once a step is whole, an earlier one that is not will never be.
    It is dropped, and its messages are late from then on.

    The ledger holds no statistics. Its holder keeps the accepted ones, applies the steps that
    `complete_steps` returns and discards what it has of other steps before the last of these.

    `applied_step` is the last step returned by `complete_steps`, `dropped` the number of steps of
    which some but not all messages came.
    """

    def __init__(self, num_ranks: int, applied_step: int = 0) -> None:
        check_interval("num_ranks", num_ranks, 1)
        check_interval("applied_step", applied_step, 0)
        self.num_ranks = num_ranks
        self.applied_step = applied_step
        self.dropped = 0
        self._whole: list[int] = []
        self._received: dict[int, set[int]] = {}

    def receive(self, step: int, rank: int) -> Receipt:
        """Note a message of `rank` for `step`; only an accepted one may be used.

        "duplicate": this rank's message for the step is already here. "late": the step has been
        applied or dropped.
        """
        check_interval("step", step, 1)
        check_interval("rank", rank, 0, self.num_ranks - 1)
        if step in self._whole:
            return "duplicate"
        if step <= self._newest_whole:
            return "late"
        ranks = self._received.setdefault(step, set())
        if rank in ranks:
            return "duplicate"
        ranks.add(rank)
        if len(ranks) == self.num_ranks:
            self._close(step)
        return "accepted"

    def complete_steps(self, last_step: int | None = None) -> tuple[int, ...]:
        """Return the steps that became whole since the last call, in order; each once.

        Those after `last_step` are kept for a later call.
        """
        steps = tuple(step for step in self._whole if last_step is None or step <= last_step)
        self._whole = self._whole[len(steps) :]
        if steps:
            self.applied_step = steps[-1]
        return steps

    @property
    def _newest_whole(self) -> int:
        return self._whole[-1] if self._whole else self.applied_step

    def _close(self, step: int) -> None:
        del self._received[step]
        for earlier in [other for other in self._received if other < step]:
            del self._received[earlier]
            self.dropped += 1
        self._whole.append(step)

    def state_dict(self) -> dict[str, int]:
        """Return what is kept over a restart.

        Messages of steps not yet applied are not part of it: their statistics are not saved
        either, so they must be taken when they are sent again, by any number of ranks.
        """
        return {"applied_step": self.applied_step, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over a state and forget all messages received so far."""
        self.applied_step = state["applied_step"]
        self.dropped = state["dropped"]
        self._whole = []
        self._received = {}
