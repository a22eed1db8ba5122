"""Built-in task `classifier`: assign one of several classes to a vector or an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from kfac_dist.data import CaseSource, MapDataset
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks.arguments import check_arguments, layer_sizes, one_of
from kfac_dist.tasks.convolutional import (
    NORMALIZATIONS,
    SHORTCUTS,
    ResNet20,
    small_convolutional_network,
)
from kfac_dist.tasks.networks import ACTIVATIONS, INITIALIZATIONS, classifier_network

_HIDDEN = (256, 128)
_CHANNELS = (16, 32, 64)
# With batch normalisation, the output of a case would depend on the other cases in its part of the
# batch, and so on the number of gradient workers.
_NORMALIZATION = "group"


class Network(Protocol):
    """A kind of network with its options, before the shape of the data is known."""

    def build(self, case_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return a new network for inputs `[N, *case_shape]`, float32.

        Its parameters are drawn from torch's global generator.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Fully connected layers on the flattened input."""

    hidden: tuple[int, ...]
    activation: str
    initialization: str

    def build(self, case_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return a network with the layers `hidden1`, ..., `output`."""
        return classifier_network(
            case_shape, self.hidden, num_classes, self.activation, self.initialization
        )


@dataclass(frozen=True, kw_only=True)
class ConvNet:
    """A few convolutions, each of which halves the size of the image."""

    channels: tuple[int, ...]
    activation: str
    normalization: str

    def build(self, case_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return a network with the layers `conv1`, ..., `output`.

        Raises InvalidSpecError if the image is too small.
        """
        num_channels, height, width = _image("convnet", case_shape)
        depth = len(self.channels)
        if min(height, width) < 2**depth:
            raise InvalidSpecError(
                f"task_args.channels: each of the {depth} convolutions halves the image, which has "
                f"only {height}x{width} pixels; use at most {min(height, width).bit_length() - 1}"
            )
        activation = ACTIVATIONS[self.activation]
        return small_convolutional_network(
            num_channels, self.channels, num_classes, activation, self.normalization
        )


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """ResNet-20."""

    normalization: str
    shortcut: str

    def build(self, case_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return a network with the layers `conv`, `blocks.0.conv1`, ..., `output`."""
        num_channels, _, _ = _image("resnet20", case_shape)
        return ResNet20(
            num_channels, num_classes, normalization=self.normalization, shortcut=self.shortcut
        )


def _image(network: str, case_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(case_shape) != 3:
        raise InvalidSpecError(
            f"task_args.network: {network} needs images, but the inputs of the data set have "
            f"shape {case_shape}; use mlp"
        )
    num_channels, height, width = case_shape
    return num_channels, height, width


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Assigns classes; the outputs are their logits, `[N, num_classes]`."""

    source: CaseSource
    network: Network

    @property
    def distribution(self) -> Literal["categorical"]:
        """One class for each case."""
        return "categorical"

    def model(self) -> nn.Module:
        """Return a new network for the data set's inputs and classes."""
        return self.network.build(self.source.case_shape(), self.source.num_classes())

    def train_data(self) -> MapDataset:
        """Return the training cases and their classes."""
        return self.source.classification("train")

    def test_data(self) -> MapDataset:
        """Return the test cases and their classes."""
        return self.source.classification("test")

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `accuracy`: 1 where the most likely class is the right one, else 0, `[N]`."""
        return {"accuracy": (outputs.argmax(dim=1) == targets).to(outputs.dtype)}


def _mlp(
    *,
    hidden: object = _HIDDEN,
    activation: object = "relu",
    initialization: object = "truncated_normal",
) -> MLP:
    return MLP(
        hidden=layer_sizes("hidden", hidden),
        activation=one_of("activation", activation, ACTIVATIONS),
        initialization=one_of("initialization", initialization, INITIALIZATIONS),
    )


def _convnet(
    *,
    channels: object = _CHANNELS,
    activation: object = "relu",
    normalization: object = _NORMALIZATION,
) -> ConvNet:
    return ConvNet(
        channels=layer_sizes("channels", channels),
        activation=one_of("activation", activation, ACTIVATIONS),
        normalization=one_of("normalization", normalization, NORMALIZATIONS),
    )


def _resnet20(*, normalization: object = _NORMALIZATION, shortcut: object = "pad") -> ResNet:
    return ResNet(
        normalization=one_of("normalization", normalization, NORMALIZATIONS),
        shortcut=one_of("shortcut", shortcut, SHORTCUTS),
    )


_NETWORKS: Mapping[str, Callable[..., Network]] = {
    "mlp": _mlp,
    "convnet": _convnet,
    "resnet20": _resnet20,
}


def classifier(source: CaseSource, *, network: object = "mlp", **options: object) -> Classifier:
    """Build the task from its `task_args`: `network`, and the options of that network.

    Raises InvalidSpecError for a value that is not allowed.
    """
    kind = one_of("network", network, _NETWORKS)
    check_arguments(_NETWORKS[kind], options, f"task classifier with network {kind}")
    return Classifier(source=source, network=_NETWORKS[kind](**options))
