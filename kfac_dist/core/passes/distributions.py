"""Predictive distributions r(y | z) over the outputs z of a model (docs/algorithm.md#fisher).

The first axis of z is the cases, and any number of axes may follow. For the categorical
distribution one of these, usually the last, has the logits of the classes. Every loss is
-log r(y | z) of one case, summed over all its output positions, without constants that do not
depend on z.

B is a root of the Fisher of the outputs of one case: `E_y[dz dz^T] = B B^T`, where dz is the
derivative of the loss with respect to z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_dist.core.passes.target_range import LEFT_OUT, TargetRange
from kfac_dist.errors import InvalidSpecError

DistributionName = Literal["bernoulli", "categorical", "gaussian"]


def _sum_per_case(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).sum(dim=1)


def _without(shape: torch.Size, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    return f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}"


def _squeezed_hint(right: tuple[int, ...], targets: Tensor) -> str:
    """Return how to repair targets that differ from `right` in an axis of length 1, else ""."""
    shape = tuple(targets.shape)
    if right == (*shape, 1):
        return "; use targets.unsqueeze(-1), or squeeze(-1) the outputs"
    if shape == (*right, 1):
        return "; use targets.squeeze(-1)"
    return ""


class Distribution(ABC):
    """What the algorithm needs of a predictive distribution."""

    name: ClassVar[DistributionName]
    noise: ClassVar[Literal["uniform", "normal"]]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return -log r(targets | outputs) for each case, [N], in nats.

        Raises:
            InvalidSpecError: the shapes do not fit; they would broadcast, or mean something else.
        """
        self.check_targets(outputs, targets)
        return self._losses(outputs, targets)

    @abstractmethod
    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what `loss` does, of targets that fit."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Check what can be seen of outputs without targets.

        Raises:
            InvalidSpecError: they are not floats, or their axes can mean several things.
        """
        if not outputs.is_floating_point():
            raise InvalidSpecError(f"the model returned a tensor of {outputs.dtype}, not of floats")

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets have the shape and the kind of type that `loss` takes.

        Only shapes and types are looked at, so nothing waits for a device.

        Raises:
            InvalidSpecError: they do not fit; the message has both shapes.
        """
        if outputs.shape != targets.shape:
            raise InvalidSpecError(
                f"{_shapes(outputs, targets)}: for {self.name} they must be the same"
                + _squeezed_hint(tuple(outputs.shape), targets)
            )
        if targets.is_complex():
            raise InvalidSpecError(f"targets of {self.name} must be real, not {targets.dtype}")

    def check_values(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that every target is possible, given the shape of the outputs.

        Raises:
            InvalidSpecError: a target is not; the message has the case and the value.
        """
        self.check_targets(outputs, targets)
        allowed = self.target_range(outputs)
        where = None if allowed is None else allowed.first_outside(targets)
        if where is not None:
            case, *inside = where
            place = f" at position {inside[0] if len(inside) == 1 else tuple(inside)}"
            raise InvalidSpecError(
                f"the target of case {case}{place if inside else ''} is {targets[where].item()}: "
                f"for {self.name} it must be {allowed}"
            )

    def target_range(self, outputs: Tensor) -> TargetRange | None:
        """Return the values that targets may have, None if all numbers are possible."""
        return None

    def kept(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return which outputs count, as 1 or 0, to multiply outputs with; None if all count."""
        return None

    def with_cases_moved(self, axis: int, *, splits: bool, num_dims: int) -> Distribution:
        """Return the distribution of outputs whose axis of cases was brought to the front.

        They had `num_dims` dimensions and the cases along `axis`. If it `splits`, that axis had
        positions as well, which have become the second axis.
        """
        return self

    def target_axis(self, axis: int, num_dims: int) -> int:
        """Return the axis of targets that is `axis` of outputs with `num_dims` dimensions."""
        return axis

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

    name = "bernoulli"
    noise = "uniform"

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the outputs of each case."""
        targets = targets.to(outputs.dtype)
        return _sum_per_case(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))

    def target_range(self, outputs: Tensor) -> TargetRange:
        """Return the range of probabilities: beyond it, the loss has no lower bound."""
        return TargetRange(lowest=0, highest=1, are_labels=False)

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
    """One of several classes; logits along `class_axis`, targets are class indices.

    With p = softmax(z) and q = sqrt(p), the root is B = diag(q) - p q^T at each position. Positions
    whose target is LEFT_OUT have no loss.

    Args:
        class_axis: the axis of the outputs with the classes. None is the last one, but then shapes
            that allow another one, too, are refused.
    """

    name = "categorical"
    noise = "uniform"

    def __init__(self, class_axis: int | None = -1) -> None:
        self._class_axis = class_axis

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, summed over the positions of each case."""
        logits = outputs.movedim(self._axis(outputs.dim()), -1)
        flat = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1).long(),
            reduction="none",
            ignore_index=LEFT_OUT,
        )
        return _sum_per_case(flat.reshape(targets.shape))

    def _axis(self, num_dims: int) -> int:
        """Return the axis of the classes, counted from the front."""
        axis = -1 if self._class_axis is None else self._class_axis
        if num_dims < 2:
            raise InvalidSpecError(
                f"the outputs have {num_dims} dimension: for categorical they need at least two, "
                "the cases and the logits of their classes; for the logit of one yes or no, use "
                "bernoulli"
            )
        if not -num_dims < axis < num_dims or axis % num_dims == 0:
            raise InvalidSpecError(
                f"class_axis: {axis} is not possible: the outputs have {num_dims} dimensions, and "
                f"the first of them is the cases; it must lie in 1..{num_dims - 1}, or be negative "
                "to count from the last"
            )
        return axis % num_dims

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that it is clear which axis has the classes."""
        super().check_outputs(outputs)
        self._axis(outputs.dim())
        if self._class_axis is None and outputs.dim() > 2:
            raise InvalidSpecError(
                f"the outputs have shape {tuple(outputs.shape)}, and no targets are seen that "
                "would show which axis has the classes: give class_axis=1 if it is the second, as "
                "in torch's cross_entropy, or class_axis=-1 if it is the last"
            )

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are integers in the shape of the outputs without their classes."""
        axis = self._axis(outputs.dim())
        fitting = [
            other
            for other in range(1, outputs.dim())
            if _without(outputs.shape, other) == targets.shape
        ]
        problem = ""
        if axis not in fitting:
            problem = (
                f"for categorical, targets must have the shape of the outputs without the classes, "
                f"{_without(outputs.shape, axis)}"
            )
            if fitting:
                problem += (
                    f", because the classes are taken to lie along axis {axis}; they seem to lie "
                    f"along axis {fitting[0]}: say so by class_axis={fitting[0]}"
                )
            elif targets.shape == outputs.shape:
                problem += ", and be indices of classes, not probabilities or one-hot vectors"
            else:
                problem += _squeezed_hint(_without(outputs.shape, axis), targets)
        elif len(fitting) > 1 and self._class_axis is None:
            problem = (
                f"the classes could lie along axis {' or '.join(map(str, fitting))}: give "
                "class_axis=1 if it is the second, as in torch's cross_entropy, or class_axis=-1 "
                "if it is the last"
            )
        if problem:
            raise InvalidSpecError(f"{_shapes(outputs, targets)}: {problem}")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InvalidSpecError(
                f"targets of a categorical distribution must be integers, not {targets.dtype}"
            )

    def target_range(self, outputs: Tensor) -> TargetRange:
        """Return the range of the classes."""
        num_classes = outputs.shape[self._axis(outputs.dim())]
        return TargetRange(lowest=0, highest=num_classes - 1, are_labels=True)

    def kept(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return 0 at positions whose target is LEFT_OUT; None if every position counts."""
        if targets is None:
            return None
        left_out = targets == LEFT_OUT
        if not left_out.any():
            return None
        return (~left_out).unsqueeze(self._axis(outputs.dim())).to(outputs.dtype)

    def with_cases_moved(self, axis: int, *, splits: bool, num_dims: int) -> Categorical:
        """Return the distribution with the axis of the classes where it is now."""
        if self._class_axis is None and num_dims > 2:
            return self
        before = self._class_axis_before(num_dims)
        if before == axis:
            raise InvalidSpecError(
                f"class_axis: axis {before} of the outputs, which have {num_dims} dimensions, has "
                "the cases; the classes need an axis of their own"
            )
        return Categorical(before + (before < axis) + splits)

    def _class_axis_before(self, num_dims: int) -> int:
        return (-1 if self._class_axis is None else self._class_axis) % num_dims

    def target_axis(self, axis: int, num_dims: int) -> int:
        """Return the axis one further to the front if the axis of the classes lies before it."""
        return axis - (self._class_axis_before(num_dims) < axis)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Invert the cumulative distribution at the noise."""
        logits = outputs.movedim(self._axis(outputs.dim()), -1)
        cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
        # Rounding can leave the last sum below 1, so it is left out: noise above all the others
        # means the last class.
        return (noise.unsqueeze(-1) >= cumulative[..., :-1]).sum(dim=-1)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return q z - p (q . z)."""
        axis = self._axis(outputs.dim())
        probabilities = torch.softmax(outputs, dim=axis)
        root = torch.sqrt(probabilities)
        return root * z - probabilities * (root * z).sum(dim=axis, keepdim=True)

    def root_transpose_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return q z - q (p . z)."""
        axis = self._axis(outputs.dim())
        probabilities = torch.softmax(outputs, dim=axis)
        root = torch.sqrt(probabilities)
        return root * (z - (probabilities * z).sum(dim=axis, keepdim=True))

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape without the axis of classes: one draw for each position."""
        return _without(outputs.shape, self._axis(outputs.dim()))[1:]


class Gaussian(Distribution):
    """Independent outputs with mean z and unit variance; loss 1/2 ||z - y||^2, B = I."""

    name = "gaussian"
    noise = "normal"

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
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


def get_distribution(name: str, class_axis: int | None = -1) -> Distribution:
    """Return the distribution called `name`; `class_axis` is that of `Categorical`.

    Raises:
        InvalidSpecError: the name is unknown; or the axis is not a whole number, is the axis of the
            cases, or is given for a distribution without classes.
    """
    if name not in _BY_NAME:
        raise InvalidSpecError(f"distribution must be one of {', '.join(_BY_NAME)}; got {name!r}")
    if class_axis is not None and (not isinstance(class_axis, int) or class_axis is True):
        raise InvalidSpecError(f"class_axis: {class_axis!r} is not a whole number")
    if name == "categorical":
        if class_axis == 0:
            raise InvalidSpecError("class_axis: 0 is the axis of the cases")
        return Categorical(class_axis)
    if class_axis not in (None, -1):
        raise InvalidSpecError(f"class_axis: {class_axis} is only for categorical, not for {name}")
    return _BY_NAME[name]()
