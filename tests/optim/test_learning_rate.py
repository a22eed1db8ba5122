"""`KFAC` as a torch.optim.Optimizer: its learning rate, its groups, copies of it."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from kfac_dist import KFAC
from kfac_dist.errors import InvalidSpecError

INPUTS, TARGETS = torch.randn(32, 6), torch.randint(3, (32,))
FALLING = {"schedule": "cosine", "initial": 0.1, "final": 0.01, "steps": 10}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def optimizer_for(model, rule="norm_constraint", **options):
    options = {"norm_constraint": 1e6} | options if rule == "norm_constraint" else options
    return KFAC(model, distribution="categorical", step_rule=rule, **options)


def steps(optimizer, num_steps, scheduler=None):
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.step(INPUTS, TARGETS).lr)
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.5), [0.1, 0.05, 0.025]),
        (lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)), [0.1, 0.05, 0.1 / 3]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=2), [0.1, 0.05, 0.0]),
        (lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=2), [0.05, 0.075, 0.1]),
    ],
)
def test_schedulers_of_torch_set_the_rate(make, expected):
    optimizer = optimizer_for(network(), lr=0.1)
    assert steps(optimizer, 3, make(optimizer)) == pytest.approx(expected)


def test_a_rate_that_is_set_is_used():
    model, other = network(), network()
    optimizer = optimizer_for(model, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.02
    assert optimizer.step(INPUTS, TARGETS).alpha == 0.02
    assert optimizer_for(other, lr=0.02).step(INPUTS, TARGETS).alpha == 0.02
    assert torch.equal(model[0].weight, other[0].weight)


def test_the_own_schedule_is_shown_in_the_group_and_not_overruled():
    optimizer = optimizer_for(network(), lr=FALLING)
    rates = [(optimizer.step(INPUTS, TARGETS).lr, optimizer.param_groups[0]["lr"]) for _ in "123"]
    assert [lr for lr, _ in rates] == [lr for _, lr in rates]
    assert rates[0][0] > rates[2][0]
    optimizer.param_groups[0]["lr"] = 0.02
    with pytest.raises(InvalidSpecError, match="but the option lr has a schedule"):
        optimizer.step(INPUTS, TARGETS)
    assert optimizer.step_count == 3


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1, "0.1", None])
def test_a_rate_that_is_no_rate_is_refused(lr):
    optimizer = optimizer_for(network(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(InvalidSpecError, match=r'param_groups\[0\]\["lr"\]: .* is not a finite'):
        optimizer.step(INPUTS, TARGETS)
    assert optimizer.step_count == 0


def test_the_adaptive_rule_has_no_rate_and_says_so():
    optimizer = optimizer_for(network(), "adaptive")
    with pytest.raises(InvalidSpecError, match="no lr under step_rule: adaptive"):
        lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(InvalidSpecError, match="use step_rule: norm_constraint"):
        optimizer.step(INPUTS, TARGETS)
    with pytest.raises(KeyError, match="weight_decay"):
        optimizer.param_groups[0]["weight_decay"]


def test_a_state_has_the_rate_that_was_reached(tmp_path):
    model = network()
    optimizer = optimizer_for(model, lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    steps(optimizer, 3, scheduler)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    other = optimizer_for(copy.deepcopy(model), lr=0.1)
    other_scheduler = lr_scheduler.StepLR(other, step_size=1, gamma=0.5)
    saved, saved_scheduler = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved)
    other_scheduler.load_state_dict(saved_scheduler)
    assert other.param_groups[0]["initial_lr"] == 0.1
    assert steps(other, 2, other_scheduler) == steps(optimizer, 2, scheduler) == [0.0125, 0.00625]


@pytest.mark.parametrize("rule", ["adaptive", "norm_constraint"])
@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_copies_and_pickles_go_on_with_their_own_model(inverse, rule):
    model = network()
    optimizer = optimizer_for(model, rule, inverse=inverse)
    if rule == "norm_constraint":
        lr_scheduler.StepLR(optimizer, step_size=10)
    steps(optimizer, 2)
    alone = copy.deepcopy(optimizer)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    expected = [optimizer.step(INPUTS, TARGETS) for _ in range(3)]
    assert [alone.step(INPUTS, TARGETS) for _ in range(3)] == expected
    for other_model, other in pairs:
        assert [other.step(INPUTS, TARGETS) for _ in range(3)] == expected
        assert torch.equal(other_model[0].weight, model[0].weight)
        assert other_model[0].weight is other.param_groups[0]["params"][0]


def test_a_second_group_is_refused_and_zero_grad_clears():
    model = network()
    optimizer = optimizer_for(model)
    with pytest.raises(InvalidSpecError, match="KFAC has one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    model(INPUTS).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
