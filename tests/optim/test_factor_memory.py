"""Factors that are too large for the memory are refused when the optimizer is made."""

import logging

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.factor_memory import check_factor_memory, device_memory, layer_memory


class Mixed(nn.Module):
    def __init__(self, outputs=30):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 4), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.norm(self.tokens(x)) * self.scale)


def registered(model, **options):
    return register(model, kfac_settings(options))


def test_the_memory_of_each_layer_is_that_of_its_tensors():
    layers = {m.layer: m.num_bytes // 4 for m in layer_memory(registered(Mixed()), 4)}
    assert layers == {
        "tokens": 3 * (11 + 16),
        "norm": 3 * 4 * 4,
        "scale": 3 * 4,
        "head": 3 * (25 + 900),
    }


@pytest.mark.parametrize("limit", [10, 3])
def test_it_is_what_a_run_allocates(limit):
    """Factors are counted as a statistics pass and the inverses hold them, shared ones once."""
    model = Mixed()
    optimizer = KFAC(model, distribution="categorical", class_axis=-1, max_factor_dim=limit)
    inputs, targets = torch.randint(11, (16, 3)), torch.randint(30, (16, 3))
    optimizer.step(inputs, targets)
    sums = optimizer._computer.statistics(inputs, None, step=1)
    factors = sum(tensor.numel() for tensor in sums.tensors())
    shelf = optimizer._curvature.shelf.inverses_in_use()
    inverses = sum(t.numel() for i in shelf.values() for t in i.inverse.tensors().values())
    found = sum(m.num_bytes for m in layer_memory(registered(model, max_factor_dim=limit), 1))
    assert found == 2 * factors + inverses


def test_what_does_not_fit_is_refused_and_what_is_large_is_said(caplog):
    registration, like = registered(Mixed()), torch.zeros(1)
    needed = sum(layer.num_bytes for layer in layer_memory(registration, 4))
    check_factor_memory(registration, like, memory_bytes=2 * needed)
    assert not caplog.records
    check_factor_memory(registration, like, memory_bytes=needed)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = r"head \(A of order 5, G of order 30: .* GiB\).*max_factor_dim"
    with pytest.raises(InvalidSpecError, match=message):
        check_factor_memory(registration, like, memory_bytes=needed - 1)


@pytest.mark.parametrize("options", [{"max_factor_dim": None}, {"inverse": "block_tridiagonal"}])
@pytest.mark.parametrize("optimizer", [KFAC, KFACPreconditioner])
def test_a_wide_head_is_refused_at_creation(optimizer, options):
    outputs = int((device_memory(torch.device("cpu")) / 12) ** 0.5) + 1000
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))
    with pytest.raises(InvalidSpecError, match=rf"2 \(A of order 4, G of order {outputs}"):
        optimizer(model, distribution="categorical", **options)
    optimizer(model, distribution="categorical")  # auto splits it
