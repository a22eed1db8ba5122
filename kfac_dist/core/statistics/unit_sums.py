"""Sums over cases for blocks without factors: of single units, and of single elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import BlockKind
from kfac_dist.core.blocks.sites import Site, WeightSharing
from kfac_dist.core.factors import UnitMoments
from kfac_dist.core.statistics.site_sums import (
    IndexSums,
    KroneckerSums,
    ObservedGradient,
    SiteCall,
    SiteSums,
)


class UnitSums(SiteSums):
    """The exact Fisher of each unit's own parameters, from the gradients of single cases."""

    def __init__(
        self, site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing
    ) -> None:
        super().__init__(site, num_cases, like, weight_sharing)
        (block,) = site.blocks
        self._M = like.new_zeros((block.dim_G, block.dim_A, block.dim_A))
        self._features: list[Tensor] = []
        self._gradients: Sequence[Tensor] = ()
        self.factors = {block.name: UnitMoments(M=self._M)}

    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Keep the features that each unit sees, [cases, positions, units, features]."""
        self.calls = calls
        self._features = [self._by_unit(call) for call in calls] if self.site.has_weight else []

    def _by_unit(self, call: SiteCall) -> Tensor:
        rows = call.rule.input_rows(call.module, call.inputs, None)
        units = len(self._M)
        return rows.reshape(call.num_cases, -1, units, rows.shape[-1] // units)

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add the outer products of the gradients of cases."""
        self._gradients = gradients
        if not self.calls:
            return
        per_call = [
            self._case_gradients(number, call, gradient)
            for number, (call, gradient) in enumerate(zip(self.calls, gradients, strict=True))
        ]
        if not self.has_cases:
            per_call = [gradient.sum(dim=0, keepdim=True) for gradient in per_call]
        total = torch.stack(per_call).sum(dim=0)
        self._M.add_(torch.einsum("nui,nuj->uij", total, total))

    def _case_gradients(self, number: int, call: SiteCall, gradient: Tensor) -> Tensor:
        """Return the gradients at one call, [cases, units, k]."""
        rows = call.rule.output_rows(call.module, gradient, None)
        g = rows.reshape(call.num_cases, -1, len(self._M))
        parts = []
        if self.site.has_weight:
            parts.append(torch.einsum("nru,nruk->nuk", g, self._features[number]))
        if self.site.has_bias:
            parts.append(g.sum(dim=1).unsqueeze(2))
        return torch.cat(parts, dim=2)

    def observed_gradient(self) -> ObservedGradient | None:
        """Return the sum of the gradients of all cases."""
        if not self.calls:
            return None
        parts, squares = [], []
        for number, (call, gradient) in enumerate(zip(self.calls, self._gradients, strict=True)):
            parts.append(self._case_gradients(number, call, gradient).sum(dim=0))
            rows = call.rule.output_rows(call.module, gradient, None)
            terms = rows.reshape(call.num_cases, -1, len(self._M)).square()
            if self.site.has_weight:
                features = self._features[number].square().sum(dim=3)
                terms = terms * (features + 1 if self.site.has_bias else features)
            squares.append(terms.sum())
        return ObservedGradient(torch.stack(parts).sum(dim=0), torch.stack(squares).sum().sqrt())


class DiagonalSums(SiteSums):
    """The diagonal of the Fisher, from squared gradients of cases (`CaseGradients`)."""

    def __init__(
        self, site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing
    ) -> None:
        super().__init__(site, num_cases, like, weight_sharing)
        (block,) = site.blocks
        self._M = like.new_zeros((block.dim_G, 1, 1))
        self.factors = {block.name: UnitMoments(M=self._M)}

    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Do nothing: a diagonal site observes no calls."""

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Do nothing: a diagonal site observes no calls."""

    def observed_gradient(self) -> ObservedGradient | None:
        """Return None: a diagonal site observes no calls."""
        return None

    def add_squares(self, squares: Tensor) -> None:
        """Add sums over cases of squared gradients, shaped like the parameter."""
        self._M.add_(squares.reshape(-1, 1, 1))


_SUMS: dict[BlockKind, type[SiteSums]] = {
    "kronecker": KroneckerSums,
    "kronecker, diagonal A": IndexSums,
    "unit-wise": UnitSums,
    "diagonal": DiagonalSums,
}


def sums_for(site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing) -> SiteSums:
    """Return sums for a site, all zero, with the dtype and the device of `like`."""
    return _SUMS[site.kind](site, num_cases, like, weight_sharing)
