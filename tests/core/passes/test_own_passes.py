"""What a pass may change in a model, and that it is as before after K-FAC's own passes."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.core.passes.own_passes import RandomStreams, own_passes
from kfac_dist.errors import InvalidSpecError


class Busy(nn.Module):
    """Draws from every stream and changes all that a module can keep."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("repeated", torch.zeros(1).expand(4), persistent=False)
        self.calls, self.largest, self.seen = 0, 0.0, []
        self.by_size = {}
        self.generator = torch.Generator()

    def forward(self, x):
        h = self.drop(torch.tanh(self.first(x)))
        noise = torch.randn(6, generator=self.generator) * random.random() * np.random.rand()
        with torch.no_grad():
            self.num_calls += 1
            self.mean.data.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.last = h.detach()
        self.calls += 1
        self.largest = max(self.largest, 1.0 + self.calls)
        self.seen.append(self.calls)
        self.by_size[len(x)] = self.calls
        return self.out(h + 0.01 * noise)


def memory_of(model):
    streams = RandomStreams(model)
    arrays = [state.numpy().tobytes() for state in streams._states]
    plain = [
        (m.calls, m.largest, list(m.seen), dict(m.by_size))
        for m in model.modules()
        if hasattr(m, "calls")
    ]
    buffers = {name: b.detach().numpy().tobytes() for name, b in model.named_buffers()}
    return arrays, random.getstate(), np.random.get_state()[1].tolist(), buffers, plain


def test_everything_that_a_pass_changes_is_set_back():
    model = Busy()
    model(torch.randn(4, 5))
    before, version = memory_of(model), model.num_calls._version
    buffer, last = model.num_calls, model.last
    with own_passes(model):
        model(torch.randn(7, 5))
        assert memory_of(model)[3:] != before[3:]
    assert memory_of(model) == before
    assert model.num_calls is buffer
    assert model.last is last
    assert version < model.num_calls._version  # the model's own change; setting back adds none


def test_a_failed_pass_is_set_back_too():
    model = Busy()
    model.out = nn.Linear(7, 3)  # fails after all that the model changes
    inputs = torch.randn(7, 5)
    before = memory_of(model)
    with pytest.raises(RuntimeError, match="shapes"):
        measured(model, inputs)
    assert memory_of(model) == before


def measured(model, inputs):
    with own_passes(model):
        return model(inputs)


def normalised(kind):
    layer = nn.Linear(5, 6)
    layer = spectral_norm(layer) if kind == "hook" else parametrizations.spectral_norm(layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


MODELS = {
    "busy": Busy,
    "spectral norm by a hook": lambda: normalised("hook"),
    "spectral norm by a parametrization": lambda: normalised("parametrization"),
    "positions": lambda: nn.Sequential(Positions(), nn.Dropout(0.5), nn.Linear(4, 3)),
}


OPTIONS = [{}, {"step_rule": "norm_constraint"}, {"inverse": "ekfac"}]


class Positions(nn.Module):
    """Has an embedding without cases, for which K-FAC makes two extra passes."""

    def __init__(self):
        super().__init__()
        self.places, self.calls = nn.Embedding(5, 4), 0
        self.largest, self.seen, self.by_size = 0.0, [], {}

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.places(torch.arange(5)) * x.unsqueeze(2)).sum(1)


def batch(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return torch.randn(16, 5), torch.randint(3, (16,))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_leaves_what_one_training_pass_leaves(name, options):
    inputs, targets = batch()
    model, other = MODELS[name](), MODELS[name]()
    other.load_state_dict(model.state_dict())
    damping = {"initial": 1.0, "adapt_period": 1}
    batch(1)
    optimizer = KFAC(model, distribution="categorical", damping=damping, **options)
    optimizer.step(inputs, targets)
    after = memory_of(model)
    batch(1)
    other(inputs)
    assert after == memory_of(other)


@pytest.mark.parametrize("name", MODELS)
def test_the_preconditioner_leaves_what_the_loop_left(name):
    inputs, targets = batch()
    model = MODELS[name]()
    preconditioner = KFACPreconditioner(model, distribution="categorical")
    for _ in range(2):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        before = memory_of(model)
        preconditioner.step()
        assert memory_of(model) == before


def test_registration_reads_a_computed_weight_without_changing_it():
    model = normalised("parametrization")
    before = memory_of(model)
    KFAC(model, distribution="categorical")
    assert memory_of(model) == before


def test_the_measured_loss_is_that_of_the_same_dropout():
    """A step of length 0 changes nothing, so loss and measured loss must be equal."""
    inputs, targets = batch()
    model = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 3))
    computer = KFAC(model, distribution="categorical")._computer
    gradient = computer.gradient(inputs, targets)
    assert computer.loss(inputs, targets) == pytest.approx(float(gradient.loss), rel=1e-6)


def test_derivatives_by_the_inputs_that_may_be_in_the_loss_are_refused_in_training():
    """Derivatives by the inputs in the loss would be missing from the curvature."""
    inputs, _ = batch()
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    preconditioner = KFACPreconditioner(model, distribution="gaussian")
    outputs = model(inputs.requires_grad_())
    with pytest.raises(InvalidSpecError, match="require gradients"):
        torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    # As in an attack, whose passes are no part of the loss.
    torch.autograd.grad(model.eval()(inputs).sum(), inputs, create_graph=True)
    model.train()(nn.Linear(5, 5)(inputs)).sum().backward()  # from another network
    preconditioner.step()
