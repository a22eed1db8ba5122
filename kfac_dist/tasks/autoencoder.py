"""Built-in task `autoencoder`: the deep autoencoders of paper 13."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kfac_dist.data import CaseSource, MapDataset
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks.arguments import layer_sizes, one_of
from kfac_dist.tasks.networks import ACTIVATIONS, INITIALIZATIONS, autoencoder_network

_Distribution = Literal["bernoulli", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class PaperNet:
    """An encoder of the paper: its input, its layers, and what the net's outputs parametrise."""

    num_inputs: int
    hidden: tuple[int, ...]
    distribution: _Distribution


# The nets of Hinton and Salakhutdinov (2006), which the paper trains.
PAPER_NETS: Mapping[str, PaperNet] = {
    "mnist": PaperNet(num_inputs=784, hidden=(1000, 500, 250, 30), distribution="bernoulli"),
    "curves": PaperNet(num_inputs=784, hidden=(400, 200, 100, 50, 25, 6), distribution="bernoulli"),
    "faces": PaperNet(num_inputs=625, hidden=(2000, 1000, 500, 30), distribution="gaussian"),
}
_NET_OF_DATA = {"mnist-5k": "mnist"}


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Reconstructs a case, usually an image, from its code.

    The outputs are logits (`bernoulli`) or values (`gaussian`), `[N, features]`.
    """

    source: CaseSource
    hidden: tuple[int, ...]
    activation: str
    initialization: str
    distribution: _Distribution

    def model(self) -> nn.Module:
        """Return a new network, float32, drawn from torch's global generator."""
        return autoencoder_network(
            prod(self.source.case_shape()), self.hidden, self.activation, self.initialization
        )

    def train_data(self) -> MapDataset:
        """Return the training cases, each its own target."""
        return self.source.reconstruction("train")

    def test_data(self) -> MapDataset:
        """Return the test cases, each its own target."""
        return self.source.reconstruction("test")

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `squared_error`, the paper's reconstruction error: a sum over pixels, `[N]`."""
        pixels = torch.sigmoid(outputs) if self.distribution == "bernoulli" else outputs
        return {"squared_error": (pixels - targets).square().sum(dim=1)}


def autoencoder(
    source: CaseSource,
    *,
    hidden: object = None,
    activation: object = "tanh",
    initialization: object = "truncated_normal",
    distribution: object = None,
) -> Autoencoder:
    """Build the task from its `task_args`; raise InvalidSpecError for a value that is not allowed.

    Args:
        source: the data set.
        hidden: sizes of the encoder's layers, the code last; by default those of the paper's net.
            Data sets that the paper does not have need it.
        activation: a name in `ACTIVATIONS`.
        initialization: a name in `INITIALIZATIONS`.
        distribution: what the outputs parametrise, bernoulli or gaussian; by default that of the
            paper's net, or gaussian.
    """
    paper = PAPER_NETS.get(_NET_OF_DATA.get(source.name, source.name))
    if paper is None and hidden is None:
        raise InvalidSpecError(
            f"task_args.hidden: is missing; the paper has nets only for {', '.join(PAPER_NETS)}, "
            f"so for {source.name} give the sizes of the encoder's layers, the code last"
        )
    if distribution is None:
        distribution = paper.distribution if paper else "gaussian"
    return Autoencoder(
        source=source,
        hidden=paper.hidden if paper and hidden is None else layer_sizes("hidden", hidden),
        activation=one_of("activation", activation, ACTIVATIONS),
        initialization=one_of("initialization", initialization, INITIALIZATIONS),
        distribution=cast(
            "_Distribution", one_of("distribution", distribution, ("bernoulli", "gaussian"))
        ),
    )
