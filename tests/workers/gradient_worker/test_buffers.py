"""Buffers of the models are averaged over the gradient workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from workers.gradient_worker.buffers import mean_buffers, read_buffers, write_buffers


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.1, -torch.inf]))


def trained(batches: int) -> nn.Module:
    model = Masked()
    for batch in range(batches):
        model.norm(torch.arange(12.0).view(4, 3) * (batch + 1))
    return model


def test_running_statistics_are_averaged_and_counters_and_constants_are_the_first_workers():
    parts = [read_buffers(trained(batches)) for batches in (1, 2, 4)]
    shared = mean_buffers(parts)
    expected = sum(part["norm.running_var"].astype(np.float64) for part in parts) / 3
    np.testing.assert_allclose(shared["norm.running_var"], expected, rtol=1e-6)
    assert shared["norm.running_var"].dtype == np.float32
    assert shared["norm.num_batches_tracked"] == 1
    np.testing.assert_array_equal(shared["mask"], parts[0]["mask"])


def test_the_mean_of_equals_is_exact():
    shared = mean_buffers([read_buffers(trained(2))] * 3)
    for name, value in read_buffers(trained(2)).items():
        np.testing.assert_array_equal(shared[name], value)


def test_buffers_that_were_read_can_be_written_back():
    model, values = trained(1), read_buffers(trained(3))
    write_buffers(model, values)
    model.norm(torch.ones(4, 3))
    assert values["norm.num_batches_tracked"] == 3  # a copy
    write_buffers(model, {"mask": np.zeros(2, np.float32)})
    assert int(model.norm.num_batches_tracked) == 4
    assert model.mask.tolist() == [0, 0]
