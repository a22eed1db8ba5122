"""Bases go out and moments come back, over real gloo connections."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair
from tests.workers.whole_jobs.local_job import in_threads, make_group
from workers.exchange.messages import Traffic
from workers.exchange.moments import Basis, ShardMoments, WorkerMoments

LIKE = torch.zeros(1, dtype=torch.float64)
LAYERS = ("a", "norm", "b")


def basis(version: int, dim_A: int, dim_G: int) -> Basis:
    matrices = [torch.randn(order, order, dtype=torch.float64) for order in (dim_A, dim_G)]
    return Basis(version_step=version, pair=KroneckerPair(A=matrices[0], G=matrices[1]))


def of(layers: tuple[str, ...], bases: dict[str, Basis]) -> dict[str, Basis]:
    return {name: bases[name] for name in layers if name in bases}


# The last has a shard whose layers have no moments, as where all are diagonal.
@pytest.mark.parametrize("cut", [(LAYERS,), (("a", "norm"), ("b",)), (("b",), ("norm",), ("a",))])
def test_each_basis_is_sent_once_and_moments_come_back_in_the_bases_sent(cut):
    first = {"b": basis(3, 4, 2), "a": basis(3, 3, 5)}
    second = {**first, "a": basis(7, 3, 5)}
    groups = make_group(2, num_shards=len(cut))
    workers = [WorkerMoments(group, cut, LIKE) for group in groups[:2]]
    shards = [ShardMoments(group, own, LIKE) for group, own in zip(groups[2:], cut, strict=True)]

    def work(rank: int) -> list[dict[str, KroneckerPair]]:
        side, seen = workers[rank], []
        side.send(None)  # no basis has been sent yet, so nothing is exchanged
        for _ in range(3):
            side.receive_bases()
            seen.append(dict(side.bases))
        ones = {name: torch.ones(len(b.G), len(b.A)).double() for name, b in side.bases.items()}
        side.send(ones if rank == 0 else None)
        side.send({name: rank * value for name, value in ones.items()})
        return seen

    def serve(number: int) -> list:
        shard = shards[number]
        before = shard.receive()
        for bases in (first, first, second):
            shard.send_bases(of(cut[number], bases))
        return [before, shard.receive(), shard.receive()]

    calls = [lambda: work(0), lambda: work(1)]
    calls += [lambda number=number: serve(number) for number in range(len(cut))]
    results = in_threads(calls)
    for seen in results[:2]:
        for bases, found in zip((first, first, second), seen, strict=True):
            assert set(found) == {"a", "b"}
            for name, pair in found.items():
                assert torch.equal(pair.A, bases[name].pair.A)
                assert torch.equal(pair.G, bases[name].pair.G)
        assert seen[1]["a"] is seen[0]["a"]
        assert seen[2]["b"] is seen[0]["b"]
    assert all(before == {} for before, *_ in results[2:])
    for when in (1, 2):
        moments = {name: layer for result in results[2:] for name, layer in result[when].items()}
        assert {name: layer.version_step for name, layer in moments.items()} == {"a": 7, "b": 3}
        assert torch.equal(moments["a"].sums, torch.ones(5, 3, dtype=torch.float64))
        assert torch.equal(moments["b"].sums, torch.ones(2, 4, dtype=torch.float64))


def test_without_layers_nothing_is_exchanged():
    groups = make_group(1)
    worker, shard = WorkerMoments(groups[0], ((),), LIKE), ShardMoments(groups[1], (), LIKE)
    shard.send_bases({})
    worker.receive_bases()
    worker.send(None)
    assert shard.receive() == {}
    assert all(group.take_traffic() == Traffic() for group in groups)
