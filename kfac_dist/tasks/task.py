"""What a task is: everything a job needs to know beyond its optimizer and its workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from kfac_dist.data import MapDataset

DistributionName = Literal["bernoulli", "categorical", "gaussian"]
DISTRIBUTIONS: tuple[str, ...] = get_args(DistributionName)


class Task(Protocol):
    """A loaded task. Each worker loads its own, so a task never crosses a process boundary.

    It knows where its data is: `load_task` was told. A model may be shaped by the data.

    `distribution` is what the model's outputs parametrise: logits of independent Bernoulli
    variables, logits of one categorical variable (last dimension), or the mean of a Gaussian of
    unit variance.
    """

    @property
    def distribution(self) -> DistributionName:
        """The predictive distribution."""
        ...

    def model(self) -> nn.Module:
        """A new network; its random numbers come from torch's global generator."""
        ...

    def train_data(self) -> MapDataset:
        """The training cases, pairs of one input and one target."""
        ...

    def test_data(self) -> MapDataset:
        """The cases the job is judged on, never trained on."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor, /) -> Mapping[str, Tensor]:
        """One number a case, `[N]`, for each metric; the job reports their means."""
        ...
