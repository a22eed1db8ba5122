import math

import pytest
import torch

from kfac_dist.core.factors import FactorAverages, KroneckerPair


def pair_of(value, size_A=3, size_G=2):
    generator = torch.Generator().manual_seed(value)
    a = torch.randn(5, size_A, generator=generator, dtype=torch.float64)
    g = torch.randn(5, size_G, generator=generator, dtype=torch.float64)
    return KroneckerPair(A=a.T @ a, G=g.T @ g)


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


def test_a_layer_without_a_state_starts_anew():
    """Its first update is a plain mean, however many updates the other layers have had."""
    one = FactorAverages(["a"], 0.95)
    for k in range(1, 9):
        one.update(step=k, sums={"a": pair_of(k)}, num_cases=1)
    both = FactorAverages(["a", "b"], 0.95)
    both.load_state_dict(one.state_dict())
    both.update(step=9, sums={"a": pair_of(9), "b": pair_of(9)}, num_cases=1)
    one.update(step=9, sums={"a": pair_of(9)}, num_cases=1)
    torch.testing.assert_close(both.pair("b").A, pair_of(9).A, rtol=1e-14, atol=1e-14)
    assert torch.equal(both.pair("a").A, one.pair("a").A)


def test_a_state_is_taken_only_for_the_layers_asked_for():
    both, one = FactorAverages(["a", "b"], 0.95), FactorAverages(["b"], 0.95)
    both.update(step=1, sums={"a": pair_of(1), "b": pair_of(2)}, num_cases=1)
    one.load_state_dict(both.state_dict())
    assert torch.equal(one.pair("b").G, both.pair("b").G)
    assert not [key for key in one.state_dict() if key.startswith("a/")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pair_tells_whether_it_is_finite(bad):
    pair = pair_of(1)
    assert pair.is_finite()
    pair.G[1, 0] = bad
    assert not pair.is_finite()
