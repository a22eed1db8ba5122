"""What a gradient worker computes from its part of a batch: sums over cases, never means.

Sums add up over any split of a batch; whoever owns the result divides by the number of cases. So
neither the reduction of a loss nor the number of workers can leave a factor 1/N in the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.distributions import Distribution
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.layers import LayerBlock, Registration
from kfac_dist.core.sampling import keyed_noise
from kfac_dist.core.statistics import BatchStatistics, StatisticsSums
from kfac_dist.core.vector import flatten, trainable_parameters, unflatten

FisherType = Literal["mc", "exact", "empirical"]


class GradientSums(NamedTuple):
    """Sums over the cases of a part of a batch.

    `loss` is float64, shape []; `gradient` [P] has the dtype of the parameters.
    """

    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Capture:
    """Inputs and outputs of a layer, one entry a call of its module in the forward pass."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def _capturing(blocks: Sequence[LayerBlock]) -> Iterator[dict[str, _Capture]]:
    captures = {block.name: _Capture() for block in blocks}

    def hook_for(capture: _Capture) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            capture.inputs.append(args[0].detach())
            capture.outputs.append(output)

        return hook

    handles = [
        block.module.register_forward_hook(hook_for(captures[block.name]))  # type: ignore[arg-type]
        for block in blocks
    ]
    try:
        yield captures
    finally:
        for handle in handles:
            handle.remove()


class BatchComputer:
    """Loss, gradient, curvature statistics and Fisher products of a model on parts of batches.

    Inputs have the cases along their first axis, [N, ...]; targets are what the distribution asks.
    Empty parts (N = 0) give zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: Distribution,
        seed: int,
        registration: Registration | None = None,
        fisher_type: FisherType = "mc",
    ) -> None:
        self.model = model
        self.distribution = distribution
        self.seed = seed
        self.fisher_type = fisher_type
        self._blocks = registration.blocks if registration else ()
        named = trainable_parameters(model)
        self.parameter_names = tuple(named)
        self.parameters = list(named.values())

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses of the cases, float64, shape []."""
        with torch.no_grad():
            if len(inputs) == 0:
                return self.parameters[0].new_zeros((), dtype=torch.float64)
            return self.distribution.loss(self.model(inputs), targets).double().sum()

    def gradient(self, inputs: Tensor, targets: Tensor) -> GradientSums:
        """Return the sums of loss and gradient over the cases (l2 is the owner's to add)."""
        if len(inputs) == 0:
            zero = self.parameters[0].new_zeros((), dtype=torch.float64)
            return GradientSums(zero, torch.zeros_like(flatten(self.parameters)))
        with torch.enable_grad():
            losses = self.distribution.loss(self.model(inputs), targets)
            gradients = torch.autograd.grad(losses.sum(), self.parameters)
        return GradientSums(losses.detach().double().sum(), flatten(gradients))

    def statistics(
        self, inputs: Tensor, targets: Tensor, *, step: int, first_row: int = 0
    ) -> dict[str, KroneckerPair]:
        """Return the sums of the batch factors of every layer over the cases given.

        `first_row` is the place of the first case among the statistics cases of the whole batch:
        the sampled targets of a case depend on (seed, step, place) alone. With `mc`, targets are
        sampled from the model's predictive distribution; `exact` sums over the columns of a root
        of the Fisher of the outputs; `empirical` uses the training targets, which is biased: it
        is not a Fisher, and it vanishes where the data are fitted.

        A layer that is applied at R positions a case is treated by *expand*: A is the mean and G
        the sum over positions.
        """
        return self.batch_statistics(inputs, targets, step=step, first_row=first_row).factors

    def batch_statistics(
        self,
        inputs: Tensor,
        targets: Tensor | None,
        *,
        step: int,
        first_row: int = 0,
        links: Iterable[Link] = (),
        bases: Mapping[str, KroneckerPair] | None = None,
    ) -> BatchStatistics:
        """Return what `statistics` does, the cross factors of `links` and moments in `bases`.

        The moments are of the same gradients that G is the second moment of. Only `empirical`
        looks at the targets.
        """
        assert self._blocks, "statistics need the registration of the model"
        collector = StatisticsSums(self._blocks, len(inputs), links, bases or {})
        if len(inputs) == 0:
            return collector.sums
        with torch.enable_grad(), _capturing(self._blocks) as captures:
            outputs = self.model(inputs)
            collector.add_inputs({name: capture.inputs for name, capture in captures.items()})
            layer_outputs = [o for capture in captures.values() for o in capture.outputs]
            for derivative in self._output_derivatives(outputs, targets, step, first_row):
                gradients = iter(
                    torch.autograd.grad(outputs, layer_outputs, derivative, retain_graph=True)
                )
                collector.add_gradients(
                    {
                        name: [next(gradients) for _ in capture.outputs]
                        for name, capture in captures.items()
                    }
                )
        return collector.sums

    def _output_derivatives(
        self, outputs: Tensor, targets: Tensor | None, step: int, first_row: int
    ) -> Iterator[Tensor]:
        """Yield derivatives of per-case losses with respect to the outputs, shaped like them."""
        detached = outputs.detach()
        if self.fisher_type == "exact":
            yield from _root_columns(self.distribution, detached)
            return
        if self.fisher_type == "mc":
            noise = keyed_noise(
                self.distribution.noise,
                seed=self.seed,
                step=step,
                rows=range(first_row, first_row + len(detached)),
                shape=self.distribution.noise_shape(detached),
                like=detached,
            )
            targets = self.distribution.sample(detached, noise)
        assert targets is not None, "the empirical Fisher is one of training targets"
        leaf = detached.clone().requires_grad_()
        loss = self.distribution.loss(leaf, targets).sum()
        yield torch.autograd.grad(loss, leaf)[0]

    def fisher_gram(self, inputs: Tensor, vectors: Tensor) -> Tensor:
        """Return the sums over cases of `(B^T J u) . (B^T J v)` for all pairs of `vectors` [m, P].

        The exact Fisher of the predictive distribution (algorithm.md section 8), [m, m] float64,
        by one forward-mode pass a vector; no reverse pass.
        """
        if len(inputs) == 0:
            return vectors.new_zeros((len(vectors), len(vectors)), dtype=torch.float64)
        primals = {
            name: parameter.detach()
            for name, parameter in zip(self.parameter_names, self.parameters, strict=True)
        }

        def forward(parameters: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = torch.func.functional_call(self.model, parameters, (inputs,))
            return outputs

        def product(vector: Tensor) -> tuple[Tensor, Tensor]:
            tangents = dict(
                zip(self.parameter_names, unflatten(vector, self.parameters), strict=True)
            )
            result = torch.func.jvp(forward, (primals,), (tangents,))
            return result[0], result[1]

        with torch.no_grad():
            outputs, derivatives = torch.func.vmap(product)(vectors)
            roots = torch.stack(
                [
                    self.distribution.root_transpose_product(outputs[0], derivative)
                    for derivative in derivatives
                ]
            )
        flat = roots.reshape(len(vectors), -1).double()
        return flat @ flat.T


def _root_columns(distribution: Distribution, outputs: Tensor) -> Iterator[Tensor]:
    """Yield B e_c for every output coordinate c of a case."""
    num_columns = outputs[0].numel()
    for column in range(num_columns):
        unit = outputs.new_zeros((len(outputs), num_columns))
        unit[:, column] = 1
        yield distribution.root_product(outputs, unit.view_as(outputs))
