"""What a task is: the model, the data and the metrics of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from kfac_dist.data import MapDataset

DistributionName = Literal["bernoulli", "categorical", "gaussian"]
DISTRIBUTIONS: tuple[str, ...] = get_args(DistributionName)


class Task(Protocol):
    """A loaded task. Each worker loads its own, so a task is never sent to another process.

    `load_task` has given it the folders of its data. The model's shape may depend on the data.

    `distribution` is what the model's outputs parametrise: logits of independent Bernoulli
    variables, logits of a categorical variable (last dimension, unless the class has an attribute
    `class_axis`), or the mean of a Gaussian with unit variance.
    """

    @property
    def distribution(self) -> DistributionName:
        """The predictive distribution."""
        ...

    def model(self) -> nn.Module:
        """Return a new network, with parameters drawn from torch's global generator."""
        ...

    def train_data(self) -> MapDataset:
        """Return the training cases, pairs `(input, target)`."""
        ...

    def test_data(self) -> MapDataset:
        """Return the cases for evaluation only, pairs `(input, target)`."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor, /) -> Mapping[str, Tensor]:
        """Return for each metric a number a case, `[N]`; the job reports the mean."""
        ...
