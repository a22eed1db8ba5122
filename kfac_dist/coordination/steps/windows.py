"""How many steps does the driver order at once?

Ordering, and reading the reports, takes the same time for one step as for many. A window has so
many steps that this is at most one part in a hundred, but lasts at most a second, so that an
interrupt or a change of membership is soon acted on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_MOST_OVERHEAD = 0.01
_LONGEST_SECONDS = 1.0
_GROWTH = 4  # a single disturbed measurement must not make a very long window


class WindowLength:
    """The number of `steps` of the next window, from what the last ones took."""

    def __init__(self) -> None:
        self.steps = 1
        self._overhead_seconds: float | None = None

    def note(self, seconds: float, step_seconds: Sequence[float]) -> None:
        """Note that a window took `seconds`, and its steps `step_seconds` each."""
        own = sum(step_seconds)
        overhead = max(seconds - own, 0.0)
        before = self._overhead_seconds
        self._overhead_seconds = overhead if before is None else min(overhead, 2 * before)
        step = own / len(step_seconds)
        if step <= 0:
            return
        wanted = math.ceil(self._overhead_seconds / (_MOST_OVERHEAD * step))
        longest = max(1, int(_LONGEST_SECONDS / step))
        self.steps = max(1, min(wanted, longest, _GROWTH * len(step_seconds)))
