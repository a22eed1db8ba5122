"""Whole steps on a convolutional network and a transformer, with every inverse structure."""

import pytest
import torch
from torch import nn

from kfac_dist.optim.optimizer import KFAC
from tests.core.inverse.layers_of_a_chain import STRUCTURES


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.second = nn.Conv2d(4, 6, 3, groups=2)
        self.groups = nn.GroupNorm(2, 6)
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = torch.relu_(self.norm(self.first(x)))
        h = torch.relu_(self.groups(self.second(self.depthwise(h))))
        return self.out(torch.tanh(self.hidden(h.mean((2, 3)))) * self.scale)


class Transformer(nn.Module):
    """Token and position embeddings, torch's own attention, tied output weights."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 8), nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.norm, self.qkv = nn.RMSNorm(8), nn.Linear(8, 24)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x):
        h = self.layer(self.tokens(x) + self.places(torch.arange(x.shape[1])))
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h)


def convnet():
    torch.manual_seed(0)
    targets = torch.randint(3, (48,))
    inputs = torch.randn(48, 1, 8, 8) + targets.view(-1, 1, 1, 1)
    return Convnet(), inputs, targets


def transformer():
    torch.manual_seed(0)
    inputs = torch.randint(7, (24, 6))
    return Transformer(), inputs, (3 * inputs + 1) % 7


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("inverse", STRUCTURES)
@pytest.mark.parametrize("problem", [convnet, transformer])
def test_steps_lower_the_loss(problem, inverse, sharing):
    model, inputs, targets = problem()
    optimizer = KFAC(
        model,
        distribution="categorical",
        inverse=inverse,
        weight_sharing=sharing,
        damping=0.1,
        statistics_fraction=0.5,
        inverse_update_period=3,
        max_factor_dim=20,
    )
    losses = [optimizer.step(inputs, targets).loss for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    assert not any(optimizer.numeric_events.values())


@pytest.mark.parametrize("inverse", STRUCTURES)
@pytest.mark.parametrize("problem", [convnet, transformer])
def test_a_restored_run_continues_as_the_uninterrupted_one(problem, inverse):
    options = {"distribution": "categorical", "inverse": inverse, "damping": 1.0}
    model, inputs, targets = problem()
    optimizer = KFAC(model, **options)
    for _ in range(4):
        optimizer.step(inputs, targets)
    other_model, _, _ = problem()
    other_model.load_state_dict(model.state_dict())
    other = KFAC(other_model, **options)
    other.load_state_dict(optimizer.state_dict())
    assert optimizer.step(inputs, targets) == other.step(inputs, targets)
    for mine, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
