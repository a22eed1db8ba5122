"""How many workers a running job shall have, as asked for from outside (`kfac-dist scale`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerWishes:
    """Numbers of workers that are wished for; None where nothing was asked."""

    gradient: int | None = None
    inverse: int | None = None


class WishBox:
    """Holds the newest wishes; any thread may change them."""

    def __init__(self) -> None:
        self._newest = WorkerWishes()

    def put(self, wishes: WorkerWishes) -> None:
        """Replace the wishes."""
        self._newest = wishes

    def newest(self) -> WorkerWishes:
        """Return the wishes that were put last."""
        return self._newest
