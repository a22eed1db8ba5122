"""Small exact models as data, over which every oracle test runs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DISTRIBUTIONS = ("bernoulli", "categorical", "gaussian")
ACTIVATIONS = {"linear": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A multi-layer perceptron and its data, all drawn from `seed`, in float64.

    `shared` are further axes between the cases and the features.
    """

    widths: tuple[int, ...]
    activation: str
    distribution: str
    bias: bool = True
    num_cases: int = 1
    shared: tuple[int, ...] = ()
    seed: int = 0

    @property
    def id(self) -> str:
        parts = ["x".join(map(str, self.widths)), self.activation, self.distribution]
        parts += [f"N{self.num_cases}"] + ([] if self.bias else ["nobias"])
        return "-".join(parts + [f"shared{self.shared}"] * bool(self.shared))

    def model(self) -> nn.Sequential:
        generator = torch.Generator().manual_seed(self.seed)
        modules: list[nn.Module] = []
        last = len(self.widths) - 2
        for i, (fan_in, fan_out) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            layer = nn.Linear(fan_in, fan_out, bias=self.bias, dtype=torch.float64)
            with torch.no_grad():
                for p in layer.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
                    p.div_(fan_in**0.5)
            modules.append(layer)
            if i < last and self.activation != "linear":
                modules.append(ACTIVATIONS[self.activation]())
        return nn.Sequential(*modules)

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1000)
        shape = (self.num_cases, *self.shared)
        inputs = torch.randn(*shape, self.widths[0], generator=generator, dtype=torch.float64)
        return inputs, self._targets(shape, generator)

    def _targets(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.distribution == "categorical":
            return torch.randint(self.widths[-1], shape, generator=generator)
        noise = torch.randn(*shape, self.widths[-1], generator=generator, dtype=torch.float64)
        return (noise > 0).to(noise.dtype) if self.distribution == "bernoulli" else noise


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the Linear layers in the order of the modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


ONE_CASE = tuple(
    Case(widths=widths, activation=activation, distribution=distribution, bias=bias, seed=seed)
    for seed, (widths, activation, bias) in enumerate(
        [
            ((3, 2), "linear", True),
            ((4, 3, 2), "tanh", True),
            ((4, 3, 3), "relu", False),
            ((3, 5, 4, 3), "sigmoid", True),
        ]
    )
    for distribution in DISTRIBUTIONS
)

DEEP_LINEAR = tuple(
    Case(widths=widths, activation="linear", distribution="gaussian", bias=bias, num_cases=7)
    for widths, bias in [
        ((3, 2), True),
        ((4, 3, 2), True),
        ((3, 4, 4, 2), True),
        ((4, 3, 2), False),
    ]
)

NONLINEAR_BATCH = tuple(
    Case(widths=(4, 5, 3), activation="tanh", distribution=distribution, num_cases=10, seed=7)
    for distribution in DISTRIBUTIONS
)
