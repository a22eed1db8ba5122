"""Built-in task `classifier`: a fully connected network that tells digits apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from kfac_dist.data import ImageDataset, ImageSource
from kfac_dist.tasks.arguments import layer_sizes, one_of
from kfac_dist.tasks.networks import ACTIVATIONS, INITIALIZATIONS, classifier_network

_NUM_CLASSES = 10
_HIDDEN = (256, 128)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The outputs are logits of the ten digits, `[N, 10]`."""

    source: ImageSource
    hidden: tuple[int, ...]
    activation: str
    initialization: str

    @property
    def distribution(self) -> Literal["categorical"]:
        """One digit an image."""
        return "categorical"

    def model(self) -> nn.Module:
        """The network, float32, from torch's global generator."""
        return classifier_network(
            self.source.num_pixels,
            self.hidden,
            _NUM_CLASSES,
            self.activation,
            self.initialization,
        )

    def train_data(self, data_dir: Path | None) -> ImageDataset:
        """Training images and their digits."""
        return self.source.classification("train", data_dir)

    def test_data(self, data_dir: Path | None) -> ImageDataset:
        """Test images and their digits."""
        return self.source.classification("test", data_dir)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`accuracy`: 1 where the most likely digit is the right one, else 0, `[N]`."""
        return {"accuracy": (outputs.argmax(dim=1) == targets).to(outputs.dtype)}


def classifier(
    source: ImageSource,
    *,
    hidden: object = _HIDDEN,
    activation: object = "relu",
    initialization: object = "truncated_normal",
) -> Classifier:
    """The task from its `task_args`; raises InvalidSpecError for a value that is not allowed."""
    return Classifier(
        source=source,
        hidden=layer_sizes("hidden", hidden),
        activation=one_of("activation", activation, ACTIVATIONS),
        initialization=one_of("initialization", initialization, INITIALIZATIONS),
    )
