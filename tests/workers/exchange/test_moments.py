"""Bases go out and moments come back, over real gloo connections."""

from __future__ import annotations

import torch

from kfac_dist.core.factors import KroneckerPair
from tests.workers.whole_jobs.local_job import in_threads, make_group
from workers.exchange.moments import Basis, ServerMoments, WorkerMoments

LIKE = torch.zeros(1, dtype=torch.float64)
LAYERS = ("a", "norm", "b")


def basis(version: int, dim_A: int, dim_G: int) -> Basis:
    matrices = [torch.randn(order, order, dtype=torch.float64) for order in (dim_A, dim_G)]
    return Basis(version_step=version, pair=KroneckerPair(A=matrices[0], G=matrices[1]))


def test_each_basis_is_sent_once_and_moments_come_back_in_the_bases_sent():
    groups = make_group(2)
    workers = [WorkerMoments(group, LAYERS, LIKE) for group in groups[:2]]
    server = ServerMoments(groups[2], LAYERS, LIKE)
    first = {"b": basis(3, 4, 2), "a": basis(3, 3, 5)}
    second = {**first, "a": basis(7, 3, 5)}

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

    def serve() -> list:
        before = server.receive()
        for bases in (first, first, second):
            server.send_bases(bases)
        return [before, server.receive(), server.receive()]

    *mirrors, (before, with_zeros, both) = in_threads([lambda: work(0), lambda: work(1), serve])
    assert before == {}
    for seen in mirrors:
        for bases, found in zip((first, first, second), seen, strict=True):
            assert list(found) == ["a", "b"]
            for name, pair in found.items():
                assert torch.equal(pair.A, bases[name].pair.A)
                assert torch.equal(pair.G, bases[name].pair.G)
        assert seen[1]["a"] is seen[0]["a"]
        assert seen[2]["b"] is seen[0]["b"]
    for moments in (with_zeros, both):
        assert {name: layer.version_step for name, layer in moments.items()} == {"a": 7, "b": 3}
        assert torch.equal(moments["a"].sums, torch.ones(5, 3, dtype=torch.float64))
        assert torch.equal(moments["b"].sums, torch.ones(2, 4, dtype=torch.float64))


def test_without_layers_nothing_is_exchanged():
    groups = make_group(1)
    worker, server = WorkerMoments(groups[0], (), LIKE), ServerMoments(groups[1], (), LIKE)
    server.send_bases({})
    worker.receive_bases()
    worker.send(None)
    assert server.receive() == {}
