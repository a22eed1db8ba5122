"""The serial optimizer with the other structures of the inverse.

Each step is compared with dense matrices in `tests/oracles/test_serial_against_slow_kfac.py`.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from kfac_dist import KFAC
from kfac_dist.errors import InvalidSpecError
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.saved_optimizers import assert_same_next_steps

INVERSES = ("block_tridiagonal", "ekfac")


def case_for(distribution, seed=0):
    return Case(
        widths=(6, 5, 5, 4),
        activation="tanh",
        distribution=distribution,
        num_cases=24,
        seed=seed,
    )


def optimizer_for(model, distribution, inverse, **options):
    chosen = {
        "damping": {"initial": 1.0, "adapt_period": 2},
        "gamma": {"adapt_period": 3},
        "inverse_update_period": 4,
    }
    return KFAC(model, distribution=distribution, inverse=inverse, **(chosen | options))


@pytest.mark.parametrize("step_rule", ["adaptive", "norm_constraint"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("inverse", INVERSES)
def test_training_lowers_the_objective(inverse, distribution, step_rule):
    model, data = case_for(distribution).model(), case_for(distribution).data()
    options = {"step_rule": step_rule, "norm_constraint": 0.05, "lr": 0.5}
    optimizer = optimizer_for(model, distribution, inverse, fisher_fraction=1.0, **options)
    results = [optimizer.step(*data) for _ in range(40)]
    assert results[-1].objective < 0.7 * results[0].objective
    assert not +optimizer.numeric_events


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("saved_after", [0, 1, 5, 8])
def test_state_round_trip_gives_the_same_next_steps_bitwise(saved_after, inverse, fisher_type):
    def optimizer_of(model):
        return optimizer_for(model, "categorical", inverse, fisher_type=fisher_type)

    assert_same_next_steps(case_for("categorical"), optimizer_of, saved_after)


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_saved_state_does_not_change_with_later_steps(inverse):
    case = case_for("bernoulli")
    optimizer = optimizer_for(case.model(), "bernoulli", inverse)
    optimizer.step(*case.data())
    state = optimizer.state_dict()
    before = {k: v.clone() for k, v in state["inverses"].items()}
    for _ in range(5):
        optimizer.step(*case.data())
    for key, value in before.items():
        assert torch.equal(state["inverses"][key], value)


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_state_of_another_structure_is_refused(inverse):
    case = case_for("bernoulli")
    optimizer = optimizer_for(case.model(), "bernoulli", inverse)
    optimizer.step(*case.data())
    other = optimizer_for(case.model(), "bernoulli", "block_diagonal")
    with pytest.raises(InvalidSpecError, match=f"inverse: {inverse}"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_batch_that_is_not_finite_changes_nothing(inverse):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model, "gaussian", inverse)
    for _ in range(2):
        optimizer.step(inputs, targets)
    before = optimizer.state_dict()["inverses"]
    poisoned = inputs.clone()
    poisoned[3, 1] = float("nan")
    assert not optimizer.step(poisoned, targets).applied
    after = optimizer.state_dict()["inverses"]
    assert all(torch.equal(after[name], saved) for name, saved in before.items())
    assert optimizer.step(inputs, targets).applied


@pytest.mark.parametrize("inverse", INVERSES)
def test_float32_models_are_trained_in_float32(inverse):
    case = case_for("categorical")
    model, (inputs, targets) = case.model().float(), case.data()
    optimizer = optimizer_for(model, "categorical", inverse)
    results = [optimizer.step(inputs.float(), targets) for _ in range(12)]
    assert results[-1].objective < results[0].objective
    inverses = optimizer.state_dict()["inverses"]
    for name, tensor in inverses.items():
        if tensor.is_floating_point() and not name.endswith(("/gamma", "/pi")):
            assert tensor.dtype == torch.float32


def test_ekfac_observes_moments_in_every_step_between_refreshes():
    case = case_for("bernoulli")
    optimizer = optimizer_for(case.model(), "bernoulli", "ekfac", inverse_update_period=100)
    for _ in range(3):
        optimizer.step(*case.data())
    first = optimizer.state_dict()["inverses"]
    optimizer.step(*case.data())
    second = optimizer.state_dict()["inverses"]
    assert torch.equal(first["0/3/0/Q_A"], second["0/3/0/Q_A"])
    assert not torch.equal(first["0/3/0/moments"], second["0/3/0/moments"])
    # Each version starts from K-FAC's own moments or takes over, and every later step observes.
    assert [int(state["0/3/0/num_updates"]) for state in (first, second)] == [3, 4]


def curves(seed, num_cases=300, size=16):
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, size)
    height, phase, slope = torch.randn(3, num_cases, 1, generator=generator)
    return torch.sigmoid(3 * (height * torch.sin(6 * t + phase) + slope * t)).double()


def autoencoder(seed):
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for fan_in, fan_out in pairwise((16, 12, 6, 2, 6, 12, 16)):
        layer = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


@cache
def mean_loss_after_training(inverse, num_steps=100, seeds=(0, 1, 2)):
    losses = []
    for seed in seeds:
        inputs = curves(seed)
        optimizer = KFAC(
            autoencoder(seed),
            distribution="bernoulli",
            seed=seed,
            inverse=inverse,
            step_rule="norm_constraint",
            damping={"initial": 0.3, "adapt_period": None},
            lr=0.5,
            norm_constraint=0.05,
            inverse_update_period=10,
            statistics_fraction=1.0,
            averaging=None,
        )
        losses.append([optimizer.step(inputs, inputs).loss for _ in range(num_steps)][-1])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("inverse", INVERSES)
def test_a_deep_autoencoder_trains_at_least_as_well_as_with_block_diagonal(inverse):
    """Per iteration, same steps and damping; mean over seeds, with a margin for rounding."""
    assert mean_loss_after_training(inverse) < mean_loss_after_training("block_diagonal") + 0.05
