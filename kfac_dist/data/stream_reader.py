"""Data sets that can only be read one case after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kfac_dist.core.passes.noise import case_key
from kfac_dist.data.randomness import OwnRandomness
from kfac_dist.errors import DataError


class _Pass:
    """A pass over the data that has come to the case at `position`."""

    def __init__(self, cases: Iterable[Any], epoch: int | None, seed: int) -> None:
        self.epoch = epoch
        self.position = 0
        self._randomness = OwnRandomness(case_key(seed, epoch, 0))
        with self._randomness.used():
            self._iterator: Iterator[Any] = iter(cases)

    def read(self, start: int, stop: int) -> list[Any]:
        """Return the cases at `start` to `stop` (exclusive); `start` is not behind `position`.

        There are fewer if the data ends before.
        """
        chosen = []
        with self._randomness.used():
            while self.position < stop:
                try:
                    case = next(self._iterator)
                except StopIteration:
                    break
                if self.position >= start:
                    chosen.append(case)
                self.position += 1
        return chosen


class StreamReader:
    """Reads the cases at chosen positions of the passes over `cases`.

    Each pass begins with `iter(cases)` and is read from its start to its end. To go back, a new one
    is begun, and what comes before the wanted position is read and dropped. The generators of
    Python, NumPy and torch are seeded by `seed` and epoch for each pass, so that processes that
    read the same pass see the same cases, though they may be shuffled.

    Training and evaluation have passes of their own, so that an evaluation does not send the
    training back to the start.
    """

    def __init__(self, cases: Iterable[Any], *, num_cases: int, seed: int, name: str) -> None:
        """Store the arguments; `name` and `num_cases` are for the message about missing cases."""
        self._cases = cases
        self._num_cases = num_cases
        self._seed = seed
        self._name = name
        self._passes: dict[bool, _Pass] = {}

    def position(self, epoch: int | None) -> int:
        """Return the position of the case that the pass is about to read, for messages."""
        current = self._passes.get(epoch is None)
        return 0 if current is None else current.position

    def read(self, epoch: int | None, start: int, stop: int) -> list[Any]:
        """Return the cases at `start` to `stop` (exclusive) of a training epoch, or evaluation.

        Raises:
            DataError: the data ends before its length says.
        """
        current = self._passes.get(epoch is None)
        if current is None or current.epoch != epoch or current.position > start:
            current = self._passes[epoch is None] = _Pass(self._cases, epoch, self._seed)
        chosen = current.read(start, stop)
        if len(chosen) < stop - start:
            raise DataError(
                f"{self._name} ended after {current.position} cases, but its __len__ says "
                f"{self._num_cases}; __len__ must be the number of cases that each pass has"
            )
        return chosen
