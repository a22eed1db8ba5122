"""Built-in task `autoencoder`: the deep autoencoders of the K-FAC paper (section 13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kfac_dist.data import ImageDataset, ImageSource
from kfac_dist.tasks.arguments import layer_sizes, one_of
from kfac_dist.tasks.networks import ACTIVATIONS, INITIALIZATIONS, autoencoder_network

_Distribution = Literal["bernoulli", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class PaperNet:
    """An encoder of the paper: its input, its layers and what its output parametrises."""

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
    """Reconstruct an image from its code.

    The outputs are logits (`bernoulli`) or pixel values (`gaussian`), `[N, num_pixels]`.
    """

    source: ImageSource
    hidden: tuple[int, ...]
    activation: str
    initialization: str
    distribution: _Distribution

    def model(self) -> nn.Module:
        """The network, float32, from torch's global generator."""
        return autoencoder_network(
            self.source.num_pixels, self.hidden, self.activation, self.initialization
        )

    def train_data(self, data_dir: Path | None) -> ImageDataset:
        """Training images, each its own target."""
        return self.source.reconstruction("train", data_dir)

    def test_data(self, data_dir: Path | None) -> ImageDataset:
        """Test images, each its own target."""
        return self.source.reconstruction("test", data_dir)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`squared_error`, the paper's reconstruction error: a sum over pixels, `[N]`."""
        pixels = torch.sigmoid(outputs) if self.distribution == "bernoulli" else outputs
        return {"squared_error": (pixels - targets).square().sum(dim=1)}


def autoencoder(
    source: ImageSource,
    *,
    hidden: object = None,
    activation: object = "tanh",
    initialization: object = "truncated_normal",
    distribution: object = None,
) -> Autoencoder:
    """The task from its `task_args`; `hidden` and `distribution` default to the paper's net.

    `hidden` are the encoder's layers, the code last. Raises InvalidSpecError for a value that
    is not allowed.
    """
    paper = PAPER_NETS[_NET_OF_DATA.get(source.name, source.name)]
    chosen = paper.distribution if distribution is None else distribution
    return Autoencoder(
        source=source,
        hidden=paper.hidden if hidden is None else layer_sizes("hidden", hidden),
        activation=one_of("activation", activation, ACTIVATIONS),
        initialization=one_of("initialization", initialization, INITIALIZATIONS),
        distribution=cast(
            "_Distribution", one_of("distribution", chosen, ("bernoulli", "gaussian"))
        ),
    )
