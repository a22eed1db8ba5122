"""Stand-ins for what torch.cuda has and a CPU has not, so that code for GPUs runs on the CPU.

A copy to the host is made only when its event is waited for: the latest moment that CUDA allows.
So code that reads a copy without waiting, or that waits and then reads another one, is found out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.exchange import host_copies

_real_copy = torch.Tensor.copy_


class _Stream:
    """A stream that does its work when an event of it is waited for."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.work: list[Callable[[], object]] = []

    def wait_stream(self, stream: _Stream) -> None:
        """The other stream has done its work already."""


class _Event:
    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "a thread that waits by spinning takes a core"
        self._lock = threading.Lock()

    def record(self, stream: _Stream) -> None:
        self._work, stream.work = stream.work, []

    def synchronize(self) -> None:
        with self._lock:
            while self._work:
                self._work.pop(0)()


def stand_in(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Replace streams, events and pinned memory; return the list of the buffers that are made."""
    current: list[_Stream] = []
    buffers: list[Tensor] = []

    @contextmanager
    def stream(of: _Stream) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    def copy(place: Tensor, tensor: Tensor, non_blocking: bool = False) -> Tensor:
        if not (current and non_blocking):
            return _real_copy(place, tensor, non_blocking)
        current[-1].work.append(lambda: _real_copy(place, tensor))
        return place

    def pinned(num_bytes: int) -> Tensor:
        buffers.append(torch.full((num_bytes,), 255, dtype=torch.uint8))  # NaN, as floats
        return buffers[-1]

    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.cuda, "stream", stream)
    patch.setattr(torch.cuda, "current_stream", lambda device: nullcontext())
    patch.setattr(torch.Tensor, "copy_", copy)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    patch.setattr(host_copies, "_pinned", pinned)
    return buffers
