"""The ladder of numeric trouble (docs/algorithm.md#ladder): each rung is reached and counted."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from kfac_dist import KFAC
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.statistics.sums import BatchStatistics
from tests.core.inverse.troubled_factors import EVENTS, FACTORS, GAMMA, LADDER
from tests.paths import ROOT

OPERATIONS = ROOT / "docs" / "operations.md"


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)


@pytest.fixture
def optimizer(monkeypatch):
    """One layer; each step uses the factors that a test puts into `optimizer.next_factors`."""
    torch.manual_seed(0)
    made = KFAC(
        nn.Sequential(nn.Linear(3, 2)),
        distribution="gaussian",
        factor_decay=0.0,
        statistics_fraction=0.125,
        inverse_update_period=1,
        gamma={"initial": GAMMA, "min": GAMMA, "adapt_period": None},
    )
    made.next_factors = FACTORS["sound"]
    monkeypatch.setattr(
        made._computer,
        "statistics",
        lambda *_, **__: BatchStatistics(factors={"0": made.next_factors}, crosses={}, moments={}),
    )
    return made


def test_every_rung_is_counted_by_its_name(optimizer, batch):
    seen = Counter()
    for trouble, expected in LADDER:
        optimizer.next_factors = FACTORS[trouble]
        assert optimizer.step(*batch).applied
        fallen = {"gradient_fallback": 1} if "no_inverse" in expected else {}
        seen.update(expected | fallen)
        assert +optimizer.numeric_events == seen, trouble
    inputs, targets = batch
    assert not optimizer.step(inputs * math.nan, targets).applied
    assert set(+optimizer.numeric_events) == EVENTS


def test_statistics_are_symmetrised_whatever_they_are(optimizer, batch):
    skew = torch.eye(4) + torch.ones(4, 4).triu(1)
    optimizer.next_factors = KroneckerPair(A=skew, G=torch.eye(2))
    optimizer.step(*batch)
    assert torch.equal(optimizer.factors["0"].A, torch.eye(4))


def test_what_is_refused_leaves_the_averages_and_the_inverse(optimizer, batch):
    optimizer.step(*batch)
    factors, direction = optimizer.factors["0"].A, optimizer.precondition({"0": torch.ones(2, 4)})
    optimizer.next_factors = FACTORS["not_finite"]
    optimizer.step(*batch)
    assert torch.equal(optimizer.factors["0"].A, factors)
    assert torch.equal(optimizer.precondition({"0": torch.ones(2, 4)})["0"], direction["0"])


def test_every_name_is_explained_to_the_operator():
    text = OPERATIONS.read_text()
    assert [name for name in sorted(EVENTS) if f"`{name}`" not in text] == []
