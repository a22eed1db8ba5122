"""What a gradient worker computes from its part of a batch: sums over cases, never means.

Sums add up over any split of a batch, and the owner of the result divides by the number of cases.
So neither the reduction of a loss nor the number of workers can leave a factor 1/N in the
statistics (docs/algorithm.md#scale).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.capture import capturing
from kfac_dist.core.passes.case_axes import (
    PLAIN,
    CaseAxes,
    cases_first,
    find_case_axes,
)
from kfac_dist.core.passes.chain import Trace, find_chain
from kfac_dist.core.passes.chain_products import ChainProducts
from kfac_dist.core.passes.distributions import Distribution
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.passes.jacobian_products import JacobianProducts
from kfac_dist.core.passes.outputs import outputs_of
from kfac_dist.core.passes.own_passes import RandomStreams, own_passes
from kfac_dist.core.passes.running_statistics import running_statistics_kept
from kfac_dist.core.statistics.statistics_pass import ModelAxes, StatisticsPass
from kfac_dist.core.statistics.sums import BatchStatistics, FisherType
from kfac_dist.core.vector import flatten, trainable_parameters


class GradientSums(NamedTuple):
    """Sums over the cases of a part of a batch.

    `loss` is float64, shape []; `gradient` [P] has the dtype of the parameters. If the model is a
    chain, `trace` is what its pass has seen, for statistics and Fisher products to reuse.
    """

    loss: Tensor
    gradient: Tensor
    trace: Trace | None = None


class BatchComputer:
    """Loss, gradient, curvature statistics and Fisher products of a model on parts of batches.

    Inputs and targets have the cases along their first axis, [N, ...], wherever the model has them;
    targets are as the distribution defines them. Empty parts (N = 0) give zeros.

    With a registration, the axes of the cases are found at the first pass. Without one, the model
    must have them first.

    Args:
        model: the model, whose parameters may change between calls but not be replaced.
        distribution: the predictive distribution of the model's outputs.
        seed: the seed of the sampled targets.
        registration: the blocks of the model; only `statistics` needs it.
        fisher_type: where the targets of the statistics come from.
        case_axis: the axis along which the model takes the cases.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distribution: Distribution,
        seed: int,
        registration: Registration | None = None,
        fisher_type: FisherType = "mc",
        case_axis: int = 0,
    ) -> None:
        self.model = model
        self.distribution = distribution
        self.parameters = list(trainable_parameters(model).values())
        self._products = JacobianProducts(model)
        chain = find_chain(model)
        self._chain = ChainProducts(model, chain) if chain else None
        self._differentiates = False
        self._streams: RandomStreams | None = None
        self._case_axis = case_axis
        self._axes: ModelAxes | None = None
        self._statistics: StatisticsPass | None = None
        if registration is not None:
            self._statistics = StatisticsPass(model, seed, registration, fisher_type, self._chain)

    def axes(self, inputs: Tensor) -> ModelAxes:
        """Return where the model has the cases, which is found out once, from cases [N, ...].

        Raises:
            InvalidSpecError: the passes do not show it, or the model does not return one tensor.
        """
        if self._axes is None:
            cases = CaseAxes(PLAIN, 0, {})
            if self._statistics is not None:
                modules = self._statistics.modules
                cases = find_case_axes(self.model, inputs, self._case_axis, modules)
            distribution = self.distribution
            if cases.outputs != PLAIN:
                distribution = distribution.with_cases_moved(
                    cases.outputs.axis, splits=cases.outputs.splits, num_dims=cases.num_output_dims
                )
            if cases.outputs != PLAIN or self._case_axis != 0:
                self._chain = None  # a trace would have other axes
            self._axes = ModelAxes(cases=cases, distribution=distribution)
        return self._axes

    @contextmanager
    def _cases_first(self, inputs: Tensor) -> Iterator[ModelAxes]:
        """Let the model take and return the cases along axis 0."""
        axes = self.axes(inputs)
        with cases_first(self.model, self._case_axis, axes.cases.outputs):
            yield axes

    def targets_first(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return targets that lie as the outputs of the model do, with the cases first.

        Targets that do not lie so are returned as they are.
        """
        place = self.axes(inputs).cases.outputs
        if place == PLAIN:
            return targets
        axis = self.distribution.target_axis(place.axis, self.axes(inputs).cases.num_output_dims)
        place = replace(place, axis=axis)
        return place.split(targets, len(inputs)) if place.fits(targets, len(inputs)) else targets

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the random streams, which only matter within a step."""
        return {**vars(self), "_streams": None}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses over the cases, float64, shape []."""
        if len(inputs) == 0:
            return self.parameters[0].new_zeros((), dtype=torch.float64)
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return self._measured(inputs, targets)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # A model that calls torch.autograd.grad itself needs a graph. An error of another
                # kind is raised again below.
                self._differentiates = True
        with torch.enable_grad():
            return self._measured(inputs, targets).detach()

    def _measured(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._cases_first(inputs) as axes:
            with self._own_passes(), running_statistics_kept(self.model):
                outputs = outputs_of(self.model, inputs)
            return axes.distribution.loss(outputs, targets).double().sum()

    @contextmanager
    def _own_passes(self) -> Iterator[None]:
        """Keep the user's state, and draw what the gradient's pass has drawn.

        With dropout, the function measured is then that of the gradient, if the cases are too.
        """
        if self._chain is not None:  # a chain has no state and draws nothing
            yield
            return
        with own_passes(self.model):
            if self._streams is not None:
                self._streams.restore()
            yield

    def gradient(self, inputs: Tensor, targets: Tensor, out: Tensor | None = None) -> GradientSums:
        """Return the sums of loss and gradient over the cases; the owner adds the l2 term.

        The gradient is a new vector, or `out` [P], which is overwritten. It is zero for parameters
        that the model does not use.

        This is the user's training pass: the only one that may move random streams, or change
        running statistics and other buffers of the model.

        Raises:
            InvalidSpecError: the targets do not fit the outputs, or one of them is not possible.
        """
        if len(inputs) == 0:
            zero = self.parameters[0].new_zeros((), dtype=torch.float64)
            zeros = [torch.zeros_like(parameter) for parameter in self.parameters]
            return GradientSums(zero, flatten(zeros, out))
        with torch.enable_grad(), self._cases_first(inputs) as axes:
            outputs, trace = self._forward(inputs)
            axes.distribution.check_values(outputs, targets)
            losses = axes.distribution.loss(outputs, targets)
            gradients = torch.autograd.grad(losses.sum(), self.parameters, materialize_grads=True)
        dense = [g.to_dense() if g.is_sparse else g for g in gradients]
        return GradientSums(losses.detach().double().sum(), flatten(dense, out), trace)

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Trace | None]:
        if self._chain is None:
            self._streams = RandomStreams(self.model)
            return outputs_of(self.model, inputs), None
        with capturing(self._chain.modules) as captures:
            outputs = outputs_of(self.model, inputs)
        return outputs, Trace.from_captures(self._chain.modules, captures, outputs)

    def statistics(
        self,
        inputs: Tensor,
        targets: Tensor | None,
        *,
        step: int,
        first_row: int = 0,
        links: Iterable[Link] = (),
        bases: Mapping[str, KroneckerPair] | None = None,
        trace: Trace | None = None,
    ) -> BatchStatistics:
        """Return the sums of the factors, the cross factors of `links` and moments in `bases`.

        See `StatisticsPass.run` for the arguments.
        """
        assert self._statistics is not None, "statistics need the registration of the model"
        if len(inputs) == 0:  # a worker without cases still sends sums, which are zero
            return self._statistics.zero(links, bases or {})
        with self._cases_first(inputs) as axes:
            return self._statistics.run(
                inputs,
                targets,
                axes,
                step=step,
                first_row=first_row,
                links=links,
                bases=bases or {},
                trace=trace,
            )

    def fisher_sums(
        self,
        inputs: Tensor,
        vectors: Sequence[Tensor],
        trace: Trace | None = None,
        targets: Tensor | None = None,
    ) -> FisherSums:
        """Return the sums over cases of `(B^T J u) . (B^T J v)` for all pairs of `vectors` [P].

        These are products with the exact Fisher of the predictive distribution (paper appendix C,
        docs/algorithm.md#step-size-and-momentum), by one forward-mode pass for each vector if the
        model permits it. A `trace` must come from the same cases and the same parameters. Positions
        that `targets` leave out are left out.
        """
        if len(inputs) == 0:
            return FisherSums.zero(len(vectors), self.parameters[0])
        with self._cases_first(inputs) as axes:
            outputs, derivatives = self._derivatives(inputs, vectors, trace)
        with torch.no_grad():
            roots = torch.stack(
                [
                    axes.distribution.root_transpose_product(outputs, derivative)
                    for derivative in derivatives
                ]
            )
            kept = axes.distribution.kept(outputs, targets)
        roots = roots if kept is None else roots * kept
        return FisherSums.from_roots(roots)

    def _derivatives(
        self, inputs: Tensor, vectors: Sequence[Tensor], trace: Trace | None
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs, and `J v` for each vector v."""
        if trace is None:
            with self._own_passes():
                return self._products.multiply(inputs, torch.stack(tuple(vectors)))
        assert self._chain is not None, "only a chain has a trace"
        return trace.outputs, self._chain.multiply(trace, vectors)
