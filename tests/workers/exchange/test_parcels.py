"""Parcels: tensors come out as they went in, and a shared tensor is sent once."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.packing import packed_size, unpack_symmetric
from kfac_dist.core.statistics.sums import BatchStatistics
from workers.exchange.parcels import (
    flat_arrays,
    merged,
    pack_inverses,
    pack_statistics,
    pack_tensors,
    read_statistics,
    unpack_inverses,
    unpack_tensors,
)

CPU = torch.device("cpu")


def symmetric(order: int, seed: int) -> torch.Tensor:
    values = torch.randn(order, order, generator=torch.Generator().manual_seed(seed))
    return values + values.T


def pair(dim_A: int, dim_G: int, seed: int) -> KroneckerPair:
    return KroneckerPair(A=symmetric(dim_A, seed), G=symmetric(dim_G, seed + 1))


def test_symmetric_matrices_are_sent_as_triangles_and_other_tensors_unchanged():
    tensors = {
        "A": torch.arange(6.0),  # a diagonal; six numbers could also be a triangle of order 3
        "G": symmetric(4, 0),
        "M": torch.randn(5, 2, 2),
        "Q_A": torch.randn(3, 3),
        "num_updates": torch.tensor(7),
    }
    packed = pack_tensors(tensors)
    assert sum(array.size for array in packed.values()) == 6 + packed_size(4) + 20 + 9 + 1
    unpacked = unpack_tensors(packed)
    assert unpacked.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(unpacked[name], tensor)
        assert unpacked[name].dtype == tensor.dtype


def statistics(seed: int) -> BatchStatistics:
    return BatchStatistics(
        factors={"a": pair(3, 2, seed), "b": pair(2, 4, seed + 2), "c": pair(4, 1, seed + 4)},
        crosses={
            "a": KroneckerPair(A=torch.randn(3, 2), G=torch.randn(2, 4)),
            "b": KroneckerPair(A=torch.randn(2, 4), G=torch.randn(4, 1)),
        },
        moments={},
    )


def test_an_owner_receives_its_layers_and_the_layers_they_are_linked_to():
    links = [Link("a", "b"), Link("b", "c")]
    parcel = pack_statistics(statistics(0))
    assert set(parcel.part(["a"], links).factors) == {"a", "b"}
    assert set(parcel.part(["a"], links).crosses) == {"a"}
    assert set(parcel.part(["b", "c"], links).factors) == {"b", "c"}
    assert set(parcel.part(["c"], links).crosses) == set()
    assert set(parcel.part(["a"], []).factors) == {"a"}


def test_factors_that_layers_share_are_packed_once():
    shared, own = pair(3, 2, 0), pair(3, 2, 10)
    factors = {"q": shared, "k": KroneckerPair(A=shared.A, G=own.G), "v": own}
    parcel = pack_statistics(BatchStatistics(factors=factors, crosses={}, moments={}))
    assert parcel.factors["q"]["A:lower"] is parcel.factors["k"]["A:lower"]
    assert parcel.factors["q"]["G:lower"] is not parcel.factors["k"]["G:lower"]
    received = pickle.loads(pickle.dumps(parcel))
    assert received.factors["q"]["A:lower"] is received.factors["k"]["A:lower"]
    for name, found in read_statistics(received).factors.items():
        tensors = unpack_symmetric(found.tensors())
        assert torch.equal(tensors["A"], factors[name].A)
        assert torch.equal(tensors["G"], factors[name].G)


def test_parts_of_a_parcel_are_put_together_again():
    links = [Link("a", "b"), Link("b", "c")]
    whole = pack_statistics(statistics(0))
    again = merged([whole.part(["c"], links), whole.part(["a"], links), whole.part(["b"], links)])
    assert again.factors.keys() == whole.factors.keys()
    assert again.crosses.keys() == whole.crosses.keys()
    for kind in ("factors", "crosses"):
        for name, arrays in getattr(whole, kind).items():
            for key, array in arrays.items():
                assert getattr(again, kind)[name][key] is array


def test_sums_are_formed_over_all_arrays_at_once_and_put_back_in_their_places():
    shared = pair(3, 2, 0)
    factors = {"q": shared, "k": KroneckerPair(A=shared.A, G=symmetric(2, 5)), "v": pair(2, 2, 9)}
    crosses = {"q": KroneckerPair(A=torch.randn(3, 2), G=torch.randn(2, 2))}
    parcel = pack_statistics(BatchStatistics(factors=factors, crosses=crosses, moments={}))
    arrays = flat_arrays(parcel)
    numbers = packed_size(3) + 2 * packed_size(2) + 2 * packed_size(2) + 6 + 4
    assert sum(array.size for array in arrays) == numbers  # the shared factor is there once
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    total = read_statistics(parcel.with_values(flat + 2 * flat))
    for name, found in total.factors.items():
        for key, tensor in unpack_symmetric(found.tensors()).items():
            own = factors[name].tensors()[key]
            assert torch.equal(tensor, own + 2 * own)
    assert torch.equal(total.crosses["q"].A, crosses["q"].A + 2 * crosses["q"].A)
    again = parcel.with_values(flat)
    assert again.factors["q"]["A:lower"] is again.factors["k"]["A:lower"]


def test_tensors_that_inverses_share_are_sent_once_and_shared_again():
    basis = symmetric(3, 0)
    inverses = [
        Inverted(inverse=KroneckerPair(A=basis, G=symmetric(2, seed)), pi=1.0, gamma=1.0, rungs=())
        for seed in (1, 2)
    ]
    parcel = pack_inverses(inverses)
    assert set(parcel.shared) == {"A:lower"}
    first, second = unpack_inverses(parcel, CPU)
    assert first["A"] is second["A"]
    for tensors, inverted in zip((first, second), inverses, strict=True):
        assert torch.equal(tensors["A"], basis)
        assert torch.equal(tensors["G"], inverted.inverse.G)
    assert pack_inverses([]) == ({}, [])
