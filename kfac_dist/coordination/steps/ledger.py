"""Which statistics may an inverse worker apply, so that each step counts exactly once?

See docs/algorithm.md#asynchrony.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Literal

from kfac_dist.coordination.checks import check_interval

Receipt = Literal["accepted", "duplicate", "late"]


class StatisticsLedger:
    """Notes the statistics messages that one inverse worker gets for its `layers`.

    A message has the sums over the whole batch for some of the layers. A step is used once it is
    *whole*: every layer has come. The next step with statistics begins only after all messages of
    a step have arrived. So when a step is whole, an earlier step that is not whole never will be:
    it is dropped, and its messages are late from then on. A step that is repeated sends its
    messages again, perhaps with the layers divided in another way; what is there already is a
    duplicate.

    The ledger does not hold the statistics themselves. Its user keeps the accepted ones, applies
    the steps that `complete_steps` returns, and discards older steps that were not returned.

    The ledger of a worker that takes over from a dead one *catches up*: earlier messages are sent
    again by several gradient workers, so they come in any order. Until `expect` tells which steps
    will be whole, none is, and these become whole in their order.

    `applied_step` is the last step that `complete_steps` has returned; after a restart it starts at
    the step of the saved statistics. `dropped` counts the steps that were begun and never became
    whole.
    """

    def __init__(
        self, layers: Collection[str], applied_step: int = 0, *, catches_up: bool = False
    ) -> None:
        check_interval("applied_step", applied_step, 0)
        self._layers = frozenset(layers)
        self.applied_step = applied_step
        self.dropped = 0
        self._whole: list[int] = []
        self._received: dict[int, set[str]] = {}
        self._expected: deque[int] = deque()
        self._is_told = not catches_up  # which steps to expect

    def expect(self, steps: Collection[int]) -> None:
        """Wait for each of `steps` before any later one; the others up to the last are lost."""
        self._expected.extend(step for step in sorted(steps) if step > self._newest_whole)
        self._is_told = True
        self._advance()

    def receive(self, step: int, layers: Collection[str]) -> Receipt:
        """Note a message with `layers` for `step`; the caller may use it only if it is accepted.

        A message is a "duplicate" if all its layers have come for the step, and "late" if the step
        has been applied or dropped.
        """
        check_interval("step", step, 1)
        if step in self._whole:
            return "duplicate"
        if step <= self._newest_whole:
            return "late"
        received = self._received.setdefault(step, set())
        if received.issuperset(layers):
            return "duplicate"
        received.update(layers)
        self._advance()
        return "accepted"

    def complete_steps(self, last_step: int | None = None) -> tuple[int, ...]:
        """Return the steps that became whole since the last call, in order.

        Steps after `last_step` are left for a later call.
        """
        steps = tuple(step for step in self._whole if last_step is None or step <= last_step)
        self._whole = self._whole[len(steps) :]
        if steps:
            self.applied_step = steps[-1]
        return steps

    @property
    def _newest_whole(self) -> int:
        return self._whole[-1] if self._whole else self.applied_step

    def _advance(self) -> None:
        """Mark as whole what is, in order; expected steps first."""
        if not self._is_told:
            return
        while self._expected and self._has_come(self._expected[0]):
            self._close(self._expected.popleft())
        if not self._expected:
            for step in sorted(filter(self._has_come, self._received)):
                self._close(step)

    def _has_come(self, step: int) -> bool:
        return self._received.get(step, set()) >= self._layers

    def _close(self, step: int) -> None:
        """Mark a step as whole, and drop the earlier steps that are not."""
        del self._received[step]
        for earlier in [other for other in self._received if other < step]:
            del self._received[earlier]
            self.dropped += 1
        self._whole.append(step)
