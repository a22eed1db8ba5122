"""Cross factors, and moments in a basis; the oracles test factors."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.distributions import get_distribution
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, Case, layer_names
from tests.oracles.truth.library import computer_for
from tests.oracles.truth.slow_structures import cross_input_factor, cross_output_factor


def case_of(distribution, shared=(), num_cases=6):
    return Case(
        widths=(4, 3, 3, 2),
        activation="tanh",
        distribution=distribution,
        num_cases=num_cases,
        shared=shared,
        seed=3,
    )


def random_basis(block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A, G = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in (block.dim_A, block.dim_G)
    )
    return KroneckerPair(A=A, G=G)


def links_of(model):
    names = layer_names(model)
    return [Link(*pair) for pair in pairwise(names)]


def everything(computer, model, inputs, targets, **more):
    bases = {block.name: random_basis(block) for block in register(model, kfac_settings({})).blocks}
    return computer.statistics(inputs, targets, step=2, links=links_of(model), bases=bases, **more)


@pytest.mark.parametrize("shared", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cross_factors_are_the_dense_ones(distribution, shared):
    case = case_of(distribution, shared)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(distribution, model, "exact")
    crosses = everything(computer, model, inputs, targets).crosses
    for link in links_of(model):
        cross = crosses[link.name]
        A = cross_input_factor(model, link, inputs)
        G = cross_output_factor(distribution, model, link, inputs)
        torch.testing.assert_close(cross.A / len(inputs), A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(cross.G / len(inputs), G, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [(), (3,)], ids=str)
@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_statistics_from_a_trace_are_those_of_a_pass(distribution, fisher_type, shared):
    case = case_of(distribution, shared)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(distribution, model, fisher_type)
    trace = computer.gradient(inputs, targets).trace
    assert trace is not None
    some = [1, 2, 5]
    expected = everything(computer, model, inputs[some], targets[some])
    found = everything(computer, model, inputs[some], targets[some], trace=trace.rows_at(some))
    for actual, tensor in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(actual, tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [(), (3,)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments_are_squares_of_the_gradients_of_single_cases(distribution, shared):
    case = case_of(distribution, shared)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(distribution, model, "empirical")
    moments = everything(computer, model, inputs, targets).moments
    gradients = dense.per_case_gradients(distribution, model, inputs, targets)
    for block in register(model, kfac_settings({})).blocks:
        basis = random_basis(block)
        expected = torch.zeros(block.dim_G, block.dim_A, dtype=torch.float64)
        for gradient in gradients:
            matrix = dense.homogeneous_matrix(gradient, model, block.name)
            expected += (basis.G.T @ matrix @ basis.A) ** 2
        torch.testing.assert_close(moments[block.name], expected, rtol=1e-10, atol=1e-12)


class Twice(nn.Module):
    """One layer used twice in a forward pass, behind another that is used once."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))


def test_a_module_that_is_called_twice_has_the_moments_of_its_whole_gradient():
    torch.manual_seed(0)
    model = Twice().double()
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    computer = computer_for("gaussian", model, "empirical")
    statistics = everything(computer, model, inputs, targets)
    gradients = dense.per_case_gradients("gaussian", model, inputs, targets)
    basis = random_basis(
        next(b for b in register(model, kfac_settings({})).blocks if b.name == "again")
    )
    expected = sum(
        (basis.G.T @ dense.homogeneous_matrix(gradient, model, "again") @ basis.A) ** 2
        for gradient in gradients
    )
    torch.testing.assert_close(statistics.moments["again"], expected)
    # Layers that are applied at different numbers of positions are taken to be uncorrelated.
    assert not statistics.crosses["first"].A.any()
    assert not statistics.crosses["first"].G.any()


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("shared", [(), (3,)], ids=str)
@pytest.mark.parametrize("split", [(6, 6), (1, 0, 11)], ids=str)
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(fisher_type, shared, split):
    case = case_of("categorical", shared, num_cases=12)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for("categorical", model, fisher_type)
    whole = everything(computer, model, inputs, targets)
    parts, start = [], 0
    for size in split:
        at = slice(start, start + size)
        parts.append(everything(computer, model, inputs[at], targets[at], first_row=start))
        start += size
    close = {"rtol": 1e-12, "atol": 1e-13}
    for name, cross in whole.crosses.items():
        torch.testing.assert_close(sum(p.crosses[name].A for p in parts), cross.A, **close)
        torch.testing.assert_close(sum(p.crosses[name].G for p in parts), cross.G, **close)
    for name, moments in whole.moments.items():
        torch.testing.assert_close(sum(p.moments[name] for p in parts), moments, **close)


def test_the_pairs_do_not_depend_on_what_else_is_asked_for():
    case = case_of("bernoulli", (2,))
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for("bernoulli", model, "mc")
    alone = computer.statistics(inputs, targets, step=2).factors
    for name, pair in everything(computer, model, inputs, targets).factors.items():
        assert torch.equal(pair.A, alone[name].A)
        assert torch.equal(pair.G, alone[name].G)


def test_moments_of_shared_layers_are_the_same_in_chunks(monkeypatch):
    case = case_of("gaussian", (3,), num_cases=7)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for("gaussian", model, "empirical")
    expected = everything(computer, model, inputs, targets).moments
    monkeypatch.setattr("kfac_dist.core.statistics.sums._CHUNK_ELEMENTS", 30)
    for name, moments in everything(computer, model, inputs, targets).moments.items():
        torch.testing.assert_close(moments, expected[name])


@pytest.mark.parametrize("spoil", ["factors", "crosses", "moments"])
def test_statistics_know_whether_they_are_finite(spoil):
    case = case_of("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    registration = register(model, kfac_settings({}))
    computer = BatchComputer(
        model, distribution=get_distribution("gaussian"), seed=0, registration=registration
    )
    statistics = everything(computer, model, inputs, targets)
    assert statistics.is_finite()
    part = getattr(statistics, spoil)[registration.names[0]]
    (part if spoil == "moments" else part.G)[0, 0] = float("inf")
    assert not statistics.is_finite()
