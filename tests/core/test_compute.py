import pytest
import torch

from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.oracles.truth.library import computer_for


def case_for(distribution, num_cases=6):
    return Case(widths=(4, 3, 3), activation="tanh", distribution=distribution, num_cases=num_cases)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_empty_parts_give_zeros(distribution):
    case = case_for(distribution)
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for(distribution, model, "mc")
    sums = computer.gradient(inputs[:0], targets[:0])
    assert sums.loss == 0
    assert torch.equal(sums.gradient, torch.zeros(dense.num_parameters(model)).double())
    assert computer.loss(inputs[:0], targets[:0]) == 0
    for pair in computer.statistics(inputs[:0], targets[:0], step=1).factors.values():
        assert pair.A.abs().sum() == 0
        assert pair.G.abs().sum() == 0
    gram = computer.fisher_sums(
        inputs[:0], torch.ones(2, dense.num_parameters(model)).double()
    ).gram
    assert torch.equal(gram, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("num_cases", [0, 4])
def test_a_gradient_is_written_to_the_given_vector(num_cases):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for("gaussian", model, "mc")
    out = torch.full_like(dense.parameter_vector(model), 7.0)
    sums = computer.gradient(inputs[:num_cases], targets[:num_cases], out)
    assert sums.gradient is out
    new = computer.gradient(inputs[:num_cases], targets[:num_cases])
    assert torch.equal(out, new.gradient)


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
def test_parameters_gradients_and_mode_are_left_alone(fisher_type):
    case = case_for("bernoulli")
    model, (inputs, targets) = case.model(), case.data()
    before = dense.parameter_vector(model)
    computer = computer_for("bernoulli", model, fisher_type)
    computer.gradient(inputs, targets)
    computer.statistics(inputs, targets, step=1)
    computer.fisher_sums(inputs, before.unsqueeze(0))
    assert torch.equal(dense.parameter_vector(model), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model(inputs).requires_grad


def test_hooks_are_removed_when_the_model_raises():
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    with pytest.raises(RuntimeError):
        computer_for("gaussian", model).statistics(inputs[:, :2], targets, step=1)
    assert not any(module._forward_hooks for module in model.modules())


def test_sampled_statistics_depend_on_seed_and_step():
    case = case_for("bernoulli", num_cases=50)
    model, (inputs, targets) = case.model(), case.data()
    first = computer_for("bernoulli", model, "mc", seed=1)
    G = first.statistics(inputs, targets, step=1).factors["0"].G
    assert torch.equal(first.statistics(inputs, targets, step=1).factors["0"].G, G)
    assert not torch.equal(first.statistics(inputs, targets, step=2).factors["0"].G, G)
    other = computer_for("bernoulli", model, "mc", seed=2)
    assert not torch.equal(other.statistics(inputs, targets, step=1).factors["0"].G, G)


def test_sampled_statistics_do_not_look_at_the_targets():
    case = case_for("bernoulli")
    model, (inputs, targets) = case.model(), case.data()
    computer = computer_for("bernoulli", model, "mc")
    G = computer.statistics(inputs, targets, step=1).factors["0"].G
    assert torch.equal(computer.statistics(inputs, 1 - targets, step=1).factors["0"].G, G)


def test_a_frozen_bias_is_in_no_sum():
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    model.get_submodule("0").bias.requires_grad_(False)
    computer = computer_for("gaussian", model)
    pair = computer.statistics(inputs, targets, step=1).factors["0"]
    torch.testing.assert_close(pair.A, inputs.T @ inputs)
    truth = dense.per_case_gradients("gaussian", model, inputs, targets).sum(dim=0)
    torch.testing.assert_close(computer.gradient(inputs, targets).gradient, truth)
    vectors = torch.eye(len(truth), dtype=torch.float64)
    gram = computer.fisher_sums(inputs, vectors).gram / len(inputs)
    torch.testing.assert_close(gram, dense.fisher("gaussian", model, inputs))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_float32_sums_stay_close_to_float64(distribution):
    case = case_for(distribution)
    model, (inputs, targets) = case.model(), case.data()
    wide = computer_for(distribution, model).gradient(inputs, targets)
    narrow_targets = targets.float() if targets.is_floating_point() else targets
    narrow_model = case.model().float()
    narrow = computer_for(distribution, narrow_model).gradient(inputs.float(), narrow_targets)
    assert narrow.gradient.dtype == torch.float32
    assert narrow.loss.dtype == torch.float64
    torch.testing.assert_close(narrow.gradient.double(), wide.gradient, rtol=1e-4, atol=1e-5)
