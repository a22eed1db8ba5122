"""Copies of tensors on the host, made beside the work of a GPU.

A copy to memory that the system may move (pageable) holds up the caller and the GPU. So tensors of
a GPU are copied to pinned memory by a stream of their own. The caller continues at once; a reader
waits for the event of the copy. Pinned memory is slow to make, so a few buffers are used in turn,
and none is overwritten before its reader has given it back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.exchange.arrays import Array

_NUM_BUFFERS = 2  # one is read while the next is written
_ALIGNMENT = 64  # bytes, between the tensors in a buffer


class Finished(Protocol):
    """What says when a copy is there: an event of torch.cuda."""

    def synchronize(self) -> None:
        """Return when the copy is there."""


class HostBuffers:
    """Byte vectors that are used in turn; each grows to the largest copy it has held.

    `allocate` makes a vector of that many bytes. Thread-safe.
    """

    def __init__(self, allocate: Callable[[int], Tensor], count: int = _NUM_BUFFERS) -> None:
        self._allocate = allocate
        self._memory: list[Tensor | None] = [None] * count
        self._free = list(range(count))
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> tuple[int, Tensor]:
        """Return a buffer's number and its first `num_bytes` bytes; wait until one is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            number = self._free.pop(0)
        memory = self._memory[number]
        if memory is None or len(memory) < num_bytes:
            memory = self._memory[number] = self._allocate(num_bytes)
        return number, memory[:num_bytes]

    def give_back(self, number: int) -> None:
        """Let a buffer be overwritten."""
        with self._changed:
            assert number not in self._free, "a buffer is given back once"
            self._free.append(number)
            self._changed.notify_all()


class HostCopy:
    """Copies of some tensors on the host, perhaps still on their way."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        finished: Finished | None = None,
        give_back: Callable[[], None] | None = None,
    ) -> None:
        self._tensors = tensors
        self._finished = finished
        self._give_back = give_back

    def arrays(self) -> list[Array]:
        """Return the values, once they are there; they may not be read after `release`."""
        if self._finished is not None:
            self._finished.synchronize()
        return [tensor.detach().numpy() for tensor in self._tensors]

    def release(self) -> None:
        """Let the memory of the copy be used again; to be called once."""
        if self._give_back is not None:
            self._give_back()


class HostCopies:
    """Makes copies of tensors that are on `device`. On the CPU the tensors themselves are used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: HostBuffers | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._buffers = HostBuffers(_pinned)

    def start(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Start to copy tensors as the current stream leaves them, and return at once.

        It waits only if two copies before are still being read.
        """
        if self._buffers is None:
            return HostCopy(tensors)
        buffers = self._buffers
        number, memory = buffers.take(sum(map(_room, tensors)))
        places = _places(memory, tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
                # Otherwise its memory could be given to another tensor before it has been read.
                tensor.record_stream(self._stream)
            finished = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            finished.record(self._stream)
        return HostCopy(places, finished, lambda: buffers.give_back(number))


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(memory: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of `memory` with the shapes and types of `tensors`, one after the other."""
    pieces = torch.split(memory, [_room(tensor) for tensor in tensors])
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]
