"""The passes over a part of a batch that give its curvature statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.blocks.sites import Site
from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.passes.capture import (
    Captures,
    Gradients,
    capturing,
    output_gradients,
)
from kfac_dist.core.passes.case_axes import CaseAxes
from kfac_dist.core.passes.case_gradients import CaseGradients
from kfac_dist.core.passes.chain import Trace
from kfac_dist.core.passes.chain_products import ChainProducts
from kfac_dist.core.passes.distributions import Distribution
from kfac_dist.core.passes.noise import keyed_noise, stream_key
from kfac_dist.core.passes.outputs import outputs_of
from kfac_dist.core.passes.own_passes import own_passes
from kfac_dist.core.passes.running_statistics import (
    batch_norms,
    batch_statistics_fixed,
    running_statistics_kept,
)
from kfac_dist.core.statistics.observed_gradient import check_observed
from kfac_dist.core.statistics.sums import BatchStatistics, FisherType, StatisticsSums
from kfac_dist.core.statistics.used_calls import used_calls
from kfac_dist.errors import InvalidSpecError

# The passes, counted from 1, that compare the gradient with what the calls give. One alone could
# miss a use whose derivatives are zero at the start.
_CHECKED_PASSES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class ModelAxes:
    """Where a model has the cases, and the distribution of its outputs with the cases first."""

    cases: CaseAxes
    distribution: Distribution


class _Observed(NamedTuple):
    """The outputs of a pass, all calls in it, and those that the outputs depend on.

    `output_gradients` takes derivatives back to the outputs of the calls in `used`.
    """

    outputs: Tensor
    captures: Captures
    used: Captures
    output_gradients: Callable[[Tensor], Gradients]


class StatisticsPass:
    """Computes the statistics of all blocks of a model.

    Args:
        model: the model to observe.
        seed: the seed of the sampled targets.
        registration: the blocks of the model.
        fisher_type: where the targets come from; see `run`.
        chain: the model as a chain of modules, None if it is not a chain. With a chain, `run` can
            use a trace.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        registration: Registration,
        fisher_type: FisherType,
        chain: ChainProducts | None,
    ) -> None:
        self._model = model
        self._chain = chain
        self._seed = seed
        self._registration = registration
        self._fisher_type = fisher_type
        self._like = next(p for p in model.parameters() if p.requires_grad)
        self.modules = tuple(dict.fromkeys(m for s in registration.sites for m in s.modules))
        diagonal = [s.parameters[0] for s in registration.sites if s.kind == "diagonal"]
        self._case_gradients = CaseGradients(model, diagonal) if diagonal else None
        self._num_passes = 0

    def run(
        self,
        inputs: Tensor,
        targets: Tensor | None,
        axes: ModelAxes,
        *,
        step: int,
        first_row: int,
        links: Iterable[Link],
        bases: Mapping[str, KroneckerPair],
        trace: Trace | None = None,
    ) -> BatchStatistics:
        """Return the sums of the statistics over the cases given.

        The Fisher type decides which targets G is computed with. `mc` samples them from the
        model's predictive distribution. `exact` sums over the columns of a root of the Fisher of
        the outputs. `empirical` uses the training targets and is biased: it is not a Fisher, and
        it vanishes where the data are fitted.

        Args:
            inputs: the cases, [N, ...].
            targets: their training targets. `empirical` uses them, and the other types look at
                which positions are left out; without targets, none are.
            axes: where the model has the cases; it takes them and returns them along axis 0.
            step: the step, on which the sampled targets depend.
            first_row: the place of the first case among the statistics cases of the whole batch.
                The sampled targets of a case depend on (seed, step, place) alone.
            links: the pairs of layers whose cross factors are wanted.
            bases: the eigenbases of layers in which moments are wanted. The moments are of the
                same gradients that G is the second moment of.
            trace: what a pass over the same cases with the same parameters has seen. Without it,
                the model is run.

        Raises:
            InvalidSpecError: the model uses a layer's weight without calling the layer, also beside
                its calls, or calls it inside a transform of torch.func; or a call has no axis of
                cases although the Fisher type needs it.
        """
        collector = self._collector(len(inputs), links, bases)
        self._num_passes += 1
        with torch.enable_grad(), self._own_passes(step, first_row):
            outputs, captures, used, back = self._observe(inputs, trace)
            collector.add_inputs(used, axes.cases)
            distribution = axes.distribution
            if targets is None:
                distribution.check_outputs(outputs)
            kept = distribution.kept(outputs, targets)
            for full in self._output_derivatives(distribution, outputs, targets, step, first_row):
                derivative = full if kept is None else full * kept
                self._check_uncalled(outputs, derivative, captures)
                collector.add_gradients(back(derivative))
                if trace is None and self._num_passes in _CHECKED_PASSES:
                    check_observed(self._model, outputs, derivative, collector.sites)
                if self._case_gradients is not None:
                    with batch_statistics_fixed(self._model, captures):
                        squares = self._case_gradients.squares(inputs, derivative)
                    collector.add_squares(squares)
        return collector.sums

    @contextmanager
    def _own_passes(self, step: int, first_row: int) -> Iterator[None]:
        """Keep the user's state; what a model draws itself depends on step and cases alone."""
        if self._chain is not None:  # a chain has no state and draws nothing
            yield
            return
        with own_passes(self._model) as streams, running_statistics_kept(self._model):
            streams.seed(stream_key(self._seed, step, first_row))
            yield

    def zero(self, links: Iterable[Link], bases: Mapping[str, KroneckerPair]) -> BatchStatistics:
        """Return the sums over no cases."""
        return self._collector(0, links, bases).sums

    def _collector(
        self, num_cases: int, links: Iterable[Link], bases: Mapping[str, KroneckerPair]
    ) -> StatisticsSums:
        return StatisticsSums(
            self._registration, self._fisher_type, num_cases, self._like, links, bases
        )

    def _observe(self, inputs: Tensor, trace: Trace | None) -> _Observed:
        if trace is not None:
            assert self._chain is not None, "only a chain has a trace"
            back = partial(self._chain.output_gradients, trace)
            calls = self._chain.captures(trace)
            return _Observed(trace.outputs, calls, calls, back)
        with capturing(self._observed()) as captures:
            outputs = outputs_of(self._model, inputs)
        self._check_plain(captures)
        used = used_calls(outputs, captures)
        return _Observed(outputs, captures, used, partial(output_gradients, outputs, used))

    def _check_plain(self, captures: Captures) -> None:
        """Check that no layer was called inside a transform of torch.func.

        What it saw there is no value that could be used outside.
        """
        inside = {
            module
            for module, calls in captures.items()
            if any(is_functorch_wrapped_tensor(call.inputs) for call in calls)
        }
        names = [
            name
            for site in self._registration.sites
            if inside.intersection(site.modules)
            for name in site.parameters
        ]
        if names:
            raise InvalidSpecError(
                f"the model calls the modules of {', '.join(names)} inside torch.func.vmap, grad "
                "or another of its transforms, where K-FAC cannot observe them; ask for diagonal "
                f"blocks with diagonal: [{', '.join(names)}]"
            )

    def _observed(self) -> Iterator[nn.Module]:
        yield from self.modules
        if self._case_gradients is not None:
            yield from batch_norms(self._model)

    def _check_uncalled(self, outputs: Tensor, derivative: Tensor, captures: Captures) -> None:
        """Check that layers that were not called have no gradient.

        Their statistics would be zero although the model uses their weights.
        """
        uncalled: list[Site] = [
            site
            for site in self._registration.sites
            if site.modules and not any(captures[module] for module in site.modules)
        ]
        if not uncalled:
            return
        parameters = dict(self._model.named_parameters())
        names = [name for site in uncalled for name in site.parameters]
        gradients = torch.autograd.grad(
            outputs,
            [parameters[name] for name in names],
            derivative,
            retain_graph=True,
            allow_unused=True,
        )
        used = [name for name, g in zip(names, gradients, strict=True) if g is not None]
        if used:
            raise InvalidSpecError(
                f"the model uses {', '.join(used)} without calling the module, so K-FAC cannot "
                f"observe it; ask for a diagonal block with diagonal: [{used[0]}]"
            )

    def _output_derivatives(
        self,
        distribution: Distribution,
        outputs: Tensor,
        targets: Tensor | None,
        step: int,
        first_row: int,
    ) -> Iterator[Tensor]:
        """Yield the derivatives of per-case losses with respect to the outputs, shaped like them.

        Statistics of several derivatives add up, as those of the columns of a root do.
        """
        detached = outputs.detach()
        if self._fisher_type == "exact":
            yield from _root_columns(distribution, detached)
            return
        if self._fisher_type == "mc":
            noise = keyed_noise(
                distribution.noise,
                seed=self._seed,
                step=step,
                rows=range(first_row, first_row + len(detached)),
                shape=distribution.noise_shape(detached),
                like=detached,
            )
            targets = distribution.sample(detached, noise)
        assert targets is not None, "the empirical Fisher needs the training targets"
        leaf = detached.clone().requires_grad_()
        loss = distribution.loss(leaf, targets).sum()
        yield torch.autograd.grad(loss, leaf)[0]


def _root_columns(distribution: Distribution, outputs: Tensor) -> Iterator[Tensor]:
    """Yield B e_c for every output coordinate c, for all cases at once."""
    num_columns = outputs[0].numel()
    for column in range(num_columns):
        unit = outputs.new_zeros((len(outputs), num_columns))
        unit[:, column] = 1
        yield distribution.root_product(outputs, unit.view_as(outputs))
