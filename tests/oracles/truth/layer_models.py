"""Small models with layers of every kind, in float64 and evaluation mode, and their data."""

import torch
from torch import nn

NUM_CASES = 6


class Scaled(nn.Module):
    """A bare parameter, a transposed convolution and a depthwise one, with norms in between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, (2, 3), groups=4, padding=1)
        self.groups = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        h = torch.relu_(self.norm(self.first(x)))
        h = torch.tanh(self.groups(self.depthwise(h)))
        return self.out(self.up(h).mean((2, 3)) * self.scale)


class Attention(nn.Module):
    """Embeddings, attention, norms over features, a fused projection."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=2)
        self.places = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.qkv = nn.Linear(4, 12)
        self.rms = nn.RMSNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        h = self.norm(self.tokens(x) + self.places(places))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        q, k, v = self.qkv(input=h).chunk(3, dim=-1)
        h = self.rms(h + nn.functional.scaled_dot_product_attention(q, k, v))
        return self.out(h.sum(1))


def randomised(model):
    """Fill parameters and running statistics with random numbers, unlike any default."""
    generator = torch.Generator().manual_seed(3)
    model = model.double().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
                value.div_(2)
            if name.endswith("running_var"):
                value.square_().add_(0.5)
    return model


def scaled():
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(NUM_CASES, 2, 4, 4, generator=generator, dtype=torch.float64)
    return randomised(Scaled()), inputs, torch.randint(3, (NUM_CASES,), generator=generator)


def attention():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randint(7, (NUM_CASES, 3), generator=generator)
    return randomised(Attention()), inputs, torch.randint(3, (NUM_CASES,), generator=generator)


MODELS = {"scaled": scaled, "attention": attention}
