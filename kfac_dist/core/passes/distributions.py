"""Predictive distributions r(y | z) over the outputs z of a model (docs/algorithm.md#fisher).

The first axis of z is the cases, and any number of axes may follow. For the categorical
distribution the last axis has the logits of the classes. Every loss is -log r(y | z) of one case,
summed over all its output positions, without constants that do not depend on z.

B is a root of the Fisher of the outputs of one case: `E_y[dz dz^T] = B B^T`, where dz is the
derivative of the loss with respect to z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_dist.errors import InvalidSpecError

DistributionName = Literal["bernoulli", "categorical", "gaussian"]


def _sum_per_case(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).sum(dim=1)


class Distribution(ABC):
    """What the algorithm needs of a predictive distribution."""

    noise: ClassVar[Literal["uniform", "normal"]]

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return -log r(targets | outputs) for each case, [N], in nats."""

    @abstractmethod
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Turn `noise` into targets drawn from r(. | outputs).

        `noise` [N, *noise_shape(outputs)] is independent standard noise of the kind `self.noise`.
        """

    @abstractmethod
    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return B z, shaped like `outputs`."""

    @abstractmethod
    def root_transpose_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return B^T z, shaped like `outputs`."""

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape of the noise that sampling the targets of one case needs."""
        return tuple(outputs.shape[1:])


class Bernoulli(Distribution):
    """Independent binary outputs given by logits z; p = sigmoid(z), B = diag(sqrt(p (1 - p)))."""

    noise = "uniform"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the outputs of each case."""
        return _sum_per_case(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return 1 where the noise is below p."""
        return (noise < torch.sigmoid(outputs)).to(outputs.dtype)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return sqrt(p (1 - p)) z."""
        probabilities = torch.sigmoid(outputs)
        return torch.sqrt(probabilities * (1 - probabilities)) * z

    def root_transpose_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return sqrt(p (1 - p)) z: B is diagonal."""
        return self.root_product(outputs, z)


class Categorical(Distribution):
    """One of several classes; logits in the last axis, targets are class indices.

    With p = softmax(z) and q = sqrt(p), the root is B = diag(q) - p q^T.
    """

    noise = "uniform"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, summed over the positions of each case."""
        flat = F.cross_entropy(
            outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), reduction="none"
        )
        return _sum_per_case(flat.reshape(targets.shape))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Invert the cumulative distribution at the noise."""
        cumulative = torch.softmax(outputs, dim=-1).cumsum(dim=-1)
        # Rounding can leave the last sum below 1, so it is left out: noise above all the others
        # means the last class.
        return (noise.unsqueeze(-1) >= cumulative[..., :-1]).sum(dim=-1)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return q z - p (q . z)."""
        probabilities = torch.softmax(outputs, dim=-1)
        root = torch.sqrt(probabilities)
        return root * z - probabilities * (root * z).sum(dim=-1, keepdim=True)

    def root_transpose_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return q z - q (p . z)."""
        probabilities = torch.softmax(outputs, dim=-1)
        root = torch.sqrt(probabilities)
        return root * (z - (probabilities * z).sum(dim=-1, keepdim=True))

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape without the axis of classes: one draw for each position."""
        return tuple(outputs.shape[1:-1])


class Gaussian(Distribution):
    """Independent outputs with mean z and unit variance; loss 1/2 ||z - y||^2, B = I."""

    noise = "normal"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return half the squared error, summed over the outputs of each case."""
        return _sum_per_case(0.5 * (outputs - targets) ** 2)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return the mean plus the noise."""
        return outputs + noise

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return z."""
        return z

    def root_transpose_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return z."""
        return z


_BY_NAME: dict[str, type[Distribution]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "gaussian": Gaussian,
}


def get_distribution(name: str) -> Distribution:
    """Return the distribution called `name`.

    Raises:
        InvalidSpecError: the name is unknown.
    """
    if name not in _BY_NAME:
        raise InvalidSpecError(f"distribution must be one of {', '.join(_BY_NAME)}; got {name!r}")
    return _BY_NAME[name]()
