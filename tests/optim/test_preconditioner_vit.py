"""A vision transformer built as those of timm are, which take and return one tensor."""

import torch
from torch import nn

from kfac_dist import KFACPreconditioner

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
