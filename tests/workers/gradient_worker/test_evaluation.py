"""Sums over a data set do not depend on where a call stops, and `limit` keeps the first cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.data import ArrayDataset
from kfac_dist.errors import DataError
from workers.exchange.messages import EvaluationSums
from workers.gradient_worker import evaluation
from workers.gradient_worker.evaluation import evaluate
from workers.gradient_worker.reading import PlainReader


class Regression:
    distribution = "gaussian"

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"error": (outputs - targets).square().sum(1)}


@pytest.fixture
def data() -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    return ArrayDataset(
        torch.randn(2500, 3, generator=generator), torch.randn(2500, 1, generator=generator)
    )


def run(data: ArrayDataset, **options: Any) -> EvaluationSums:
    torch.manual_seed(1)
    computer = BatchComputer(
        nn.Linear(3, 1), distribution=get_distribution("gaussian"), seed=0, registration=None
    )
    settings: dict[str, Any] = {"limit": None, "num_workers": 1, "rank": 0} | options
    reader = PlainReader({"test": data}, seed=0)
    return evaluate(computer, Regression(), reader, "test", **settings)  # type: ignore[arg-type]


def test_calls_that_stop_early_add_up_to_the_same_bits(
    data: ArrayDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data)
    assert (whole.num_cases, whole.num_left) == (2500, 0)
    monkeypatch.setattr(evaluation, "_CALL_SECONDS", -1.0)
    counts, part = [], None
    while part is None or part.num_left:
        part = run(data, before=part)
        counts.append(part.num_cases)
    assert counts == [1000, 2000, 2500]
    assert part == whole


def test_the_limit_is_shared_by_the_workers(data: ArrayDataset) -> None:
    first = ArrayDataset(data.inputs[:7], data.targets[:7])
    assert run(data, limit=7) == run(first)
    assert run(data, limit=9999) == run(data)
    parts = [run(data, limit=7, num_workers=3, rank=rank) for rank in range(3)]
    assert [part.num_cases for part in parts] == [3, 2, 2]
    assert sum(part.loss for part in parts) == pytest.approx(run(first).loss)
    idle = run(data, limit=2, num_workers=3, rank=2)
    assert (idle.num_cases, idle.num_left) == (0, 0)


def test_a_case_that_cannot_be_used_is_named(data: ArrayDataset) -> None:
    data.targets[2222] = math.nan
    run(data, limit=2222)
    with pytest.raises(DataError, match="test data, target of case 2222 at position 0 is nan"):
        run(data)
