"""Copies on the host: buffers are used in turn, and never overwritten while they are read."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.gpu.streams_of_the_cpu import stand_in
from tests.waiting import wait_until
from workers.exchange.host_copies import HostBuffers, HostCopies, _places, _room


def make_buffers() -> tuple[HostBuffers, list[int]]:
    allocated: list[int] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    return HostBuffers(allocate), allocated


def test_buffers_are_used_in_turn_and_grow_only_when_they_must():
    buffers, allocated = make_buffers()
    numbers = []
    for num_bytes in (10, 8, 10, 20, 20, 5):
        number, memory = buffers.take(num_bytes)
        assert len(memory) == num_bytes
        numbers.append(number)
        buffers.give_back(number)
    assert numbers == [0, 1, 0, 1, 0, 1]
    assert allocated == [10, 8, 20, 20]


def test_no_buffer_is_overwritten_while_it_is_read():
    buffers, _ = make_buffers()
    (first, one), (second, two) = buffers.take(4), buffers.take(4)
    one.fill_(1)
    two.fill_(2)
    taken: list[int] = []

    def write() -> None:
        number, memory = buffers.take(4)
        memory.fill_(3)
        taken.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    wait_until(lambda: bool(buffers._changed._waiters), "the writer to wait")
    assert (one.tolist(), two.tolist(), taken) == ([1] * 4, [2] * 4, [])
    buffers.give_back(second)
    writer.join(30)
    assert (one.tolist(), two.tolist(), taken) == ([1] * 4, [3] * 4, [second])
    assert first != second


def test_a_buffer_is_given_back_once():
    buffers, _ = make_buffers()
    number, _ = buffers.take(1)
    buffers.give_back(number)
    with pytest.raises(AssertionError):
        buffers.give_back(number)


def test_tensors_of_all_types_and_shapes_have_places_of_their_own_in_a_buffer():
    tensors = [
        torch.randn(3, 5),
        torch.tensor(7),
        torch.ones(0, 4),
        torch.randn(2, 2, 2, dtype=torch.float64),
    ]
    memory = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    places = _places(memory, tensors)
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    for place, tensor in zip(places, tensors, strict=True):
        assert torch.equal(place, tensor)
        assert place.dtype == tensor.dtype


def test_on_the_cpu_nothing_is_copied():
    tensors = [torch.randn(3), torch.randn(2, 2)]
    copy = HostCopies(torch.device("cpu")).start(tensors)
    for array, tensor in zip(copy.arrays(), tensors, strict=True):
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
    copy.release()


def test_a_copy_from_a_gpu_is_read_after_its_event_and_its_buffer_is_used_again(monkeypatch):
    made = stand_in(monkeypatch)
    copies = HostCopies(torch.device("cuda", 0))
    first, second = (
        copies.start([torch.full((5,), value), torch.tensor(3)]) for value in (1.0, 2.0)
    )
    assert torch.isnan(made[0][:20].view(torch.float32)).all(), "nobody has waited yet"
    for copy, value in ((second, 2.0), (first, 1.0)):
        numbers, three = copy.arrays()
        assert numbers.tolist() == [value] * 5
        assert three == 3
    first.release()
    third = copies.start([torch.full((5,), 4.0)])
    assert second.arrays()[0].tolist() == [2.0] * 5
    assert third.arrays()[0].tolist() == [4.0] * 5
    assert len(made) == 2
