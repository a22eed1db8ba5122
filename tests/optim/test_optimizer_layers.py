"""Whole steps on a convolutional network and transformers, with every inverse structure."""

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
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


WIDTH, HEADS, CLASSES = 8, 2, 3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def projections(self, x):
        return self.qkv(x)

    def forward(self, x):
        shape = (*x.shape[:2], 3, HEADS, -1)
        q, k, v = self.projections(x).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ApartAttention(Attention):
    """The same with a layer for each projection."""

    def __init__(self, fused):
        super().__init__()
        self.proj = fused.proj
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        weights, biases = fused.qkv.weight.chunk(3), fused.qkv.bias.chunk(3)
        for layer, weight, bias in zip(self.qkv, weights, biases, strict=True):
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.bias = nn.Parameter(bias.detach().clone())

    def projections(self, x):
        return torch.cat([layer(x) for layer in self.qkv], dim=-1)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(WIDTH), Attention(), LayerScale()
        self.norm2, self.ls2 = nn.LayerNorm(WIDTH), LayerScale()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A network built as those of timm are, which take and return one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_each_part_of_qkv_has_the_direction_of_a_layer_of_its_own():
    images, labels = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % CLASSES
    fused, apart = VisionTransformer().double(), VisionTransformer()
    for block in apart.blocks:
        block.attn = ApartAttention(block.attn)
    apart.double()
    for model in (fused, apart):
        preconditioner = KFACPreconditioner(
            model,
            distribution="categorical",
            fisher_type="exact",
            statistics_fraction=1.0,
            damping=0.1,
        )
        nn.functional.cross_entropy(model(images), labels).backward()
        preconditioner.step()
    for name, parameter in fused.named_parameters():
        if "qkv" in name:
            owner, _, role = name.rpartition(".")
            parts = [getattr(layer, role).grad for layer in apart.get_submodule(owner)]
            torch.testing.assert_close(parameter.grad, torch.cat(parts))
        else:
            torch.testing.assert_close(parameter.grad, apart.get_parameter(name).grad)
    kinds = {row.block for row in preconditioner.registration_report()}
    assert kinds == {"kronecker", "unit-wise", "diagonal"}
