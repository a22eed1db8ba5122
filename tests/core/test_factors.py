import math

import pytest
import torch

from kfac_dist.core.factors import (
    FactorAverages,
    KroneckerPair,
    Link,
    PackedFactors,
    UnitMoments,
    old_weight,
)
from kfac_dist.core.packing import pack_symmetric


def pair_of(value, size_A=3, size_G=2):
    generator = torch.Generator().manual_seed(value)
    a = torch.randn(5, size_A, generator=generator, dtype=torch.float64)
    g = torch.randn(5, size_G, generator=generator, dtype=torch.float64)
    return KroneckerPair(A=a.T @ a, G=g.T @ g)


def test_the_old_value_weighs_1_minus_1_over_k_until_it_reaches_the_decay():
    weights = [old_weight(k, 0.75) for k in range(1, 7)]
    assert weights == [0.0, 0.5, 1 - 1 / 3, 0.75, 0.75, 0.75]


def test_without_decay_only_the_newest_value_counts():
    assert [old_weight(k, 0.0) for k in (1, 2, 100)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
def test_averages_follow_the_rule(decay):
    averages = FactorAverages(["a"], decay)
    expected = None
    for k in range(1, 40):
        sums, cases = pair_of(k), k % 4 + 1
        averages.update(step=2 * k, sums={"a": sums}, num_cases=cases)
        eps = min(1 - 1 / k, decay)
        mean = sums.A / cases
        expected = mean if k == 1 else eps * expected + (1 - eps) * mean
        torch.testing.assert_close(averages.pair("a").A, expected, rtol=1e-12, atol=1e-12)
        assert averages.step == 2 * k


def test_first_updates_are_plain_means():
    averages = FactorAverages(["a"], 0.95)
    for k in range(1, 20):
        averages.update(step=k, sums={"a": pair_of(k)}, num_cases=1)
    mean = sum(pair_of(k).G for k in range(1, 20)) / 19
    torch.testing.assert_close(averages.pair("a").G, mean, rtol=1e-12, atol=1e-12)


def test_sums_are_neither_kept_nor_changed():
    averages, sums = FactorAverages(["a"], 0.5), pair_of(1)
    before = sums.A.clone()
    averages.update(step=1, sums={"a": sums}, num_cases=2)
    averages.update(step=2, sums={"a": pair_of(2)}, num_cases=2)
    assert torch.equal(sums.A, before)
    kept = averages.pair("a")
    kept.A.zero_()
    assert averages.pair("a").A.abs().sum() > 0


def test_layers_that_share_a_factor_share_its_average():
    shared, apart = FactorAverages(["a", "b"], 0.9), FactorAverages(["a", "b"], 0.9)
    for k in range(1, 5):
        first = pair_of(k)
        second = KroneckerPair(A=first.A, G=pair_of(k + 10).G)
        shared.update(step=k, sums={"a": first, "b": second}, num_cases=2)
        copied = KroneckerPair(A=first.A.clone(), G=second.G.clone())
        apart.update(step=k, sums={"a": first, "b": copied}, num_cases=2)
    for name in ("a", "b"):
        assert torch.equal(shared.pair(name).A, apart.pair(name).A)
        assert torch.equal(shared.pair(name).G, apart.pair(name).G)
    assert shared._averages["a"].A is shared._averages["b"].A
    assert apart._averages["a"].A is not apart._averages["b"].A


def test_pair_is_exactly_symmetric():
    averages = FactorAverages(["a"], 0.5)
    skewed = pair_of(1)
    skewed.A[0, 1] += 1e-9
    averages.update(step=1, sums={"a": skewed}, num_cases=1)
    kept = averages.pair("a")
    assert torch.equal(kept.A, kept.A.T)


def test_state_round_trip_gives_the_same_next_averages():
    names = ["a", "b"]
    averages = FactorAverages(names, 0.95)
    for k in range(1, 4):
        averages.update(step=k, sums={n: pair_of(k + len(n)) for n in names}, num_cases=3)
    other = FactorAverages(names, 0.95)
    other.load_state_dict(averages.state_dict())
    for each in (averages, other):
        each.update(step=9, sums={n: pair_of(77) for n in names}, num_cases=3)
    for name in names:
        assert torch.equal(averages.pair(name).A, other.pair(name).A)
        assert torch.equal(averages.pair(name).G, other.pair(name).G)
    assert other.step == 9


@pytest.mark.parametrize("restored_after", [0, 3])
def test_averages_of_packed_triangles_are_those_of_matrices_to_the_last_bit(restored_after):
    """The sizes include multiples of the width of vector registers, and others."""
    sums = [
        {
            "pair": KroneckerPair(A=gram(37, 2 * k), G=gram(64, 2 * k + 1)),
            "embedding": KroneckerPair(A=gram(9, k).diagonal().clone(), G=gram(5, k)),
            "norm": UnitMoments(M=torch.stack([gram(2, k + unit) for unit in range(7)])),
        }
        for k in range(8)
    ]
    whole, packed = FactorAverages(sums[0], 0.9), FactorAverages(sums[0], 0.9)
    for step, batch in enumerate(sums):
        if step == restored_after:
            packed.load_state_dict(pack_symmetric(packed.state_dict()))
        whole.update(step, batch, 3)
        triangles = {n: PackedFactors(packed=pack_symmetric(f.tensors())) for n, f in batch.items()}
        packed.update(step, triangles, 3)
    for name in whole.names:
        expected, found = whole.pair(name).tensors(), packed.pair(name).tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def gram(order, seed):
    rows = torch.randn(order, order, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


def test_a_layer_without_a_state_starts_anew():
    """Its first update is a plain mean, however many updates the other layers have had."""
    alone = FactorAverages(["a"], 0.95)
    for k in range(1, 9):
        alone.update(step=k, sums={"a": pair_of(k)}, num_cases=1)
    both = FactorAverages(["a", "b"], 0.95)
    both.load_state_dict(alone.state_dict())
    both.update(step=9, sums={"a": pair_of(9), "b": pair_of(9)}, num_cases=1)
    alone.update(step=9, sums={"a": pair_of(9)}, num_cases=1)
    torch.testing.assert_close(both.pair("b").A, pair_of(9).A, rtol=1e-14, atol=1e-14)
    assert torch.equal(both.pair("a").A, alone.pair("a").A)


def test_a_state_is_loaded_only_for_the_layers_asked_for():
    both, alone = FactorAverages(["a", "b"], 0.95), FactorAverages(["b"], 0.95)
    both.update(step=1, sums={"a": pair_of(1), "b": pair_of(2)}, num_cases=1)
    alone.load_state_dict(both.state_dict())
    assert torch.equal(alone.pair("b").G, both.pair("b").G)
    assert not [key for key in alone.state_dict() if key.startswith("a/")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pair_knows_whether_it_is_finite(bad):
    pair = pair_of(1)
    assert pair.is_finite()
    pair.G[1, 0] = bad
    assert not pair.is_finite()


CHAIN = ("a", "b", "c")
LINKS = (Link("a", "b"), Link("b", "c"))


def cross_of(value, size=3):
    generator = torch.Generator().manual_seed(1000 + value)
    return KroneckerPair(
        A=torch.randn(size, size, generator=generator, dtype=torch.float64),
        G=torch.randn(2, 2, generator=generator, dtype=torch.float64),
    )


def chain_after(num_updates, names=CHAIN, links=LINKS):
    averages = FactorAverages(names, 0.8, links)
    for k in range(1, num_updates + 1):
        sums = {name: pair_of(k + ord(name)) for name in names}
        crosses = {link.name: cross_of(k + ord(link.name)) for link in links}
        averages.update(k, sums, 4, crosses)
    return averages


def test_cross_factors_are_averaged_with_the_weights_of_their_layers():
    expected = None
    for k in range(1, 9):
        eps = min(1 - 1 / k, 0.8)
        batch = cross_of(k + ord("b")).A / 4
        expected = batch if k == 1 else eps * expected + (1 - eps) * batch
    snapshot = chain_after(8).snapshot("b")
    assert snapshot.step == 8
    torch.testing.assert_close(snapshot.cross.A, expected, rtol=1e-12, atol=1e-12)
    averages = chain_after(8)
    assert torch.equal(snapshot.pair.G, averages.pair("b").G)
    assert torch.equal(snapshot.next_pair.A, averages.pair("c").A)


def test_the_last_layer_of_a_chain_has_no_next():
    snapshot = chain_after(2).snapshot("c")
    assert snapshot.next_pair is None
    assert snapshot.cross is None


def test_a_snapshot_does_not_change_with_later_updates():
    averages = chain_after(3)
    snapshot = averages.snapshot("a")
    before = snapshot.cross.A.clone()
    sums = {name: pair_of(7) for name in CHAIN}
    averages.update(4, sums, 1, {"a": cross_of(7), "b": cross_of(8)})
    assert torch.equal(snapshot.cross.A, before)


def test_a_link_without_its_cross_factors_is_a_mistake():
    averages = FactorAverages(CHAIN, 0.8, LINKS)
    with pytest.raises(AssertionError, match="cross"):
        averages.update(1, {name: pair_of(1) for name in CHAIN}, 1)


def test_a_chain_of_different_snapshots_is_refused():
    averages = chain_after(3)
    averages._num_updates["b"] += 1
    with pytest.raises(ValueError, match="of the same batches"):
        averages.snapshot("a")
    assert averages.snapshot("c").step == 3


def test_state_round_trip_of_a_chain():
    averages, other = chain_after(5), FactorAverages(CHAIN, 0.8, LINKS)
    other.load_state_dict(averages.state_dict())
    for each in (averages, other):
        sums = {name: pair_of(50) for name in CHAIN}
        each.update(6, sums, 2, {"a": cross_of(1), "b": cross_of(2)})
    for name in CHAIN:
        expected, found = averages.snapshot(name), other.snapshot(name)
        assert torch.equal(found.pair.A, expected.pair.A)
        if name != "c":
            assert torch.equal(found.cross.A, expected.cross.A)
            assert torch.equal(found.cross.G, expected.cross.G)


@pytest.mark.parametrize("missing", ["a", "b", "c"])
def test_a_chain_with_a_layer_that_starts_anew_starts_anew(missing):
    """Otherwise its neighbours would keep averages without a matching cross factor."""
    kept = {
        key: value
        for key, value in chain_after(5).state_dict().items()
        if not key.startswith(f"{missing}/")
    }
    averages = FactorAverages((*CHAIN, "d"), 0.8, LINKS)
    averages.load_state_dict(kept)
    assert averages.state_dict().keys() == {"step"}


def test_layers_outside_the_chain_are_kept_when_it_starts_anew():
    state = chain_after(5).state_dict() | {
        f"d/{key.removeprefix('a/')}": value
        for key, value in chain_after(5).state_dict().items()
        if key.startswith("a/") and "cross" not in key
    }
    del state["a/cross_A"]
    averages = FactorAverages((*CHAIN, "d"), 0.8, LINKS)
    averages.load_state_dict(state)
    assert torch.equal(averages.pair("d").A, chain_after(5).pair("a").A)
    assert "c/A" not in averages.state_dict()
