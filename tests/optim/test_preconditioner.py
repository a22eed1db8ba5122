"""KFACPreconditioner in typical training loops, with every wrapper that users put around them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.errors import InvalidSpecError

JOB = Path(__file__).parent / "processes" / "ddp_job.py"
_spec = importlib.util.spec_from_file_location("ddp_job", JOB)
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)


def preconditioner_for(model, **options):
    options = {"distribution": "categorical", "damping": 0.1, "statistics_fraction": 1.0} | options
    return KFACPreconditioner(model, **options)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def backward(model, step=0, scale=1.0):
    inputs, targets = job.data(step)
    (nn.functional.cross_entropy(model(inputs), targets) * scale).backward()


def test_the_direction_is_the_damped_inverse_of_the_factors_times_the_gradient():
    model = job.model().double()
    inputs, targets = job.data(0)
    inputs = inputs.double()
    preconditioner = preconditioner_for(model, fisher_type="exact")
    nn.functional.cross_entropy(model(inputs), targets).backward()
    before = gradients(model)
    preconditioner.step()
    computer = BatchComputer(
        model,
        distribution=get_distribution("categorical"),
        seed=0,
        registration=register(model, kfac_settings({})),
        fisher_type="exact",
    )
    sums = computer.statistics(inputs, targets, step=1).factors
    pair, gamma = sums["2"], 0.1**0.5
    A, G = pair.A / len(inputs), pair.G / len(inputs)
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    damped = torch.kron(G + gamma / pi * torch.eye(len(G)), A + pi * gamma * torch.eye(len(A)))
    V = torch.cat([before[2], before[3].unsqueeze(1)], dim=1)
    U = torch.linalg.solve(damped, V.reshape(-1)).view_as(V)
    torch.testing.assert_close(model[2].weight.grad, U[:, :-1])
    torch.testing.assert_close(model[2].bias.grad, U[:, -1])


@pytest.mark.parametrize("inverse", job.INVERSES)
def test_micro_batches_are_one_batch(inverse):
    everything = slice(None)
    whole = job.train(job.model(), inverse, everything)
    parts = job.train(job.model(), inverse, everything, micro_batches=4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


class SmallNet(nn.Module):
    """Layers of several kinds; `qkv` is split into parts that share their factor A."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.qkv = nn.Linear(24, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.output = nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.norm(self.conv(inputs.view(-1, 1, 2, 3))))
        return self.output(torch.tanh(self.qkv(hidden.flatten(1)) * self.scale))


# EKFAC's basis of a null space is made of rounding, and 16 cases leave one.
@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
def test_layers_of_every_kind_are_preconditioned(inverse):
    everything = slice(None)
    whole = job.train(SmallNet(), inverse, everything)
    parts = job.train(SmallNet(), inverse, everything, micro_batches=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    kinds = {row.block for row in preconditioner_for(SmallNet()).registration_report()}
    assert kinds == {"kronecker", "unit-wise", "diagonal"}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    results = [folder / f"{rank}.pt" for rank in range(2)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(folder / "store"), str(rank), "2", str(result)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(result) for result in results]


@pytest.mark.parametrize("inverse", job.INVERSES)
def test_two_processes_equal_one_on_the_whole_batch(two_processes, inverse):
    first, second = (trained[inverse] for trained in two_processes)
    alone = job.train(job.model(), inverse, slice(None))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-6, atol=1e-6)


@pytest.fixture
def nothing_compiled():
    """Clear compiled code, which is cached by class, with the hooks of the first instance."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_model_is_observed_too():
    plain, other = job.model(), job.model()
    compiled = torch.compile(other, backend="eager")
    for model in (plain, compiled):
        preconditioner = preconditioner_for(model)
        backward(model)
        preconditioner.step()
    for gradient, other_gradient in zip(gradients(plain), gradients(other), strict=True):
        torch.testing.assert_close(gradient, other_gradient)


@pytest.mark.usefixtures("nothing_compiled")
def test_a_model_that_is_compiled_afterwards_is_observed_too():
    plain, other = job.model(), job.model()
    preconditioner, plain_preconditioner = preconditioner_for(other), preconditioner_for(plain)
    backward(torch.compile(other, backend="eager"))
    preconditioner.step()
    backward(plain)
    plain_preconditioner.step()
    for gradient, other_gradient in zip(gradients(plain), gradients(other), strict=True):
        torch.testing.assert_close(gradient, other_gradient)


def test_a_scaled_gradient_gives_a_direction_scaled_alike():
    plain, scaled = job.model(), job.model()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        preconditioner = preconditioner_for(model)
        backward(model, scale=scale)
        preconditioner.step()
    for gradient, other_gradient in zip(gradients(plain), gradients(scaled), strict=True):
        torch.testing.assert_close(gradient, other_gradient / 1024)


def test_autocast_and_grad_scaler_train():
    model = job.model()
    preconditioner = preconditioner_for(model, norm_constraint=1e-2, lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        inputs, targets = job.data(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not preconditioner.numeric_events["bad_step"]


def test_an_overflown_gradient_is_left_to_the_scaler():
    model = job.model()
    preconditioner = preconditioner_for(model)
    backward(model)
    model[0].weight.grad[0, 0] = float("inf")
    before = gradients(model)
    preconditioner.step()
    assert all(map(torch.equal, gradients(model), before))
    assert preconditioner.numeric_events["bad_step"] == 1


def test_parameter_groups_and_a_schedule_of_the_learning_rate():
    model = job.model()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[4].parameters()}], lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    preconditioner = preconditioner_for(
        model, norm_constraint=1e-3, lr=lambda: optimizer.param_groups[1]["lr"]
    )
    before = model[2].weight.detach().clone()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        preconditioner.step()
        optimizer.step()
        schedule.step()
        inputs, targets = job.data(0)
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model(inputs), targets)))
    assert losses[-1] < losses[0]
    assert torch.equal(model[2].weight, before), "a parameter in no group does not move"


def test_the_norm_constraint_bounds_the_step():
    model = job.model()
    preconditioner = preconditioner_for(model, norm_constraint=1e-6, lr=0.5)
    backward(model)
    before = torch.cat([gradient.reshape(-1) for gradient in gradients(model)])
    preconditioner.step()
    step = 0.5 * torch.cat([gradient.reshape(-1) for gradient in gradients(model)])
    unbounded = job.model()
    free = preconditioner_for(unbounded)
    backward(unbounded)
    free.step()
    direction = torch.cat([gradient.reshape(-1) for gradient in gradients(unbounded)])
    scale = float(step.norm() / direction.norm())
    assert scale**2 * float(direction @ before) == pytest.approx(1e-6, rel=1e-4)


@pytest.mark.parametrize("inverse", job.INVERSES)
def test_a_restored_state_continues_the_same_way(inverse, tmp_path):
    models = [job.model(), job.model()]
    first, second = (
        preconditioner_for(model, inverse=inverse, inverse_update_period=3) for model in models
    )
    for step in range(4):
        models[0].zero_grad()
        backward(models[0], step)
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert second.step_count == 4
    for preconditioner, model in zip((first, second), models, strict=True):
        model.zero_grad()
        backward(model, 4)
        preconditioner.step()
    assert all(map(torch.equal, gradients(models[0]), gradients(models[1])))


def test_evaluation_is_not_observed_and_frozen_parameters_stay_out():
    model = job.model()
    model[0].requires_grad_(False)
    preconditioner = preconditioner_for(model)
    model.eval()
    model(job.data(0)[0])
    with torch.no_grad():
        model.train()(job.data(0)[0])
    with pytest.raises(InvalidSpecError, match="no forward pass in training mode"):
        preconditioner.step()
    assert preconditioner.step_count == 0
    backward(model)
    preconditioner.step()
    assert preconditioner.step_count == 1
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, left, right):
        return self.linear(left + right)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preconditioner_for(job.model(), step_rule="adaptive"), "no option step_rule"),
        (lambda: preconditioner_for(job.model(), fisher_type="empirical"), "targets"),
        (lambda: preconditioner_for(job.model(), norm_constraint=1e-3), "belong together"),
        (lambda: preconditioner_for(job.model(), damping=-1.0), "damping"),
        (lambda: preconditioner_for(job.model().bfloat16()), "bfloat16"),
    ],
)
def test_mistakes_are_reported(make, message):
    with pytest.raises(InvalidSpecError, match=message):
        make()


def test_a_model_of_two_inputs_is_the_function_of_both():
    one, two = nn.Linear(6, 3), TwoInputs()
    two.linear.load_state_dict(one.state_dict())
    left, right = job.data(0)[0], job.data(1)[0]
    for model, inputs in ((one, (left + right,)), (two, (left, right))):
        preconditioner = preconditioner_for(model, statistics_fraction=0.5)
        model(*inputs).square().sum().backward()
        preconditioner.step()
    assert torch.equal(one.weight.grad, two.linear.weight.grad)


def test_options_are_those_of_kfac():
    preconditioner = preconditioner_for(job.model(), factor_decay=0.5, pi_norm="frobenius")
    assert preconditioner.settings == kfac_settings(
        {"damping": 0.1, "statistics_fraction": 1.0, "factor_decay": 0.5, "pi_norm": "frobenius"}
    )
    assert len(preconditioner.registration_report()) == 6
