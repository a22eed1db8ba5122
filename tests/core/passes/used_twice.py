"""Small models that use a weight beside the calls of its module, or route cases past a module."""

import torch
import torch.nn.functional as F
from torch import nn


class Twice(nn.Module):
    """`use(model, h)` returns what becomes of the inputs of the hidden layer."""

    def __init__(self, use):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.LayerNorm(5)
        self.hidden, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
        self.use = use

    def forward(self, x):
        h = self.use(self, self.norm(torch.tanh(self.first(x))))
        return self.out(torch.tanh(self.hidden(h)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(7, 5), nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.hidden(self.tokens(x))) @ self.tokens.weight.T


class Slope(nn.Module):
    """Returns derivatives of a network by its inputs, as physics-informed models do."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            values = self.out(torch.tanh(self.first(leaf)))
            (slopes,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        return slopes


class Jacobian(Slope):
    """The same derivatives, by torch.func."""

    def forward(self, x):
        slope = torch.func.grad(lambda case: self.out(torch.tanh(self.first(case))).sum())
        return torch.func.vmap(slope)(x)


class Lazy(Slope):
    """The same derivatives, and leaves it to the caller to enable gradients."""

    def forward(self, x):
        leaf = x.detach().requires_grad_()
        values = self.out(torch.tanh(self.first(leaf)))
        (slopes,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        return slopes


class Routed(nn.Module):
    """Gives all rows to one of two experts, and none to the other."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.used = 0

    def forward(self, x):
        h = torch.tanh(self.first(x))
        parts = [h if number == self.used else h[:0] for number in range(2)]
        return self.out(
            torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        )


USES = {
    "output by the embedding": lambda: (Tied(), "tokens.weight", torch.randint(7, (6, 3))),
    "linear": lambda: (
        Twice(lambda model, h: torch.tanh(F.linear(h, model.hidden.weight))),
        "hidden.weight",
        torch.randn(12, 4),
    ),
    "bias": lambda: (
        Twice(lambda model, h: h + model.first.bias),
        "first.weight",
        torch.randn(12, 4),
    ),
    "norm": lambda: (
        Twice(lambda model, h: h * model.norm.weight),
        "norm.weight",
        torch.randn(12, 4),
    ),
    "derivative by the inputs": lambda: (Slope(), "first.weight", torch.randn(12, 4)),
}
