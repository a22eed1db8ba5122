"""The structures of the approximate inverse (the option `inverse`): how they differ.

A layer's inverse consists of its named tensors, `inverse.tensors()`, its gamma and its pi. It is
sent between processes and saved in that form.

    links, bases        what gradient workers compute beside A and G
    invert_at_gammas    what inverse workers do: a snapshot of the factors, inverted at each gamma
    install, observe    what the owner of the inverses does with new ones, and with moments
    precondition        from the gradients of all layers to the direction
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.factors import (
    KroneckerPair,
    LayerFactors,
    LayerSnapshot,
    Link,
    UnitMoments,
    factors_from_tensors,
)
from kfac_dist.core.inverse.damped import InversionFailedError, Inverted, invert_layer, redamp_layer
from kfac_dist.core.inverse.ekfac import EigenInverse, at_gamma, eigen_inverse
from kfac_dist.core.inverse.precondition import LayerInverse, precondition_layers
from kfac_dist.core.inverse.tridiagonal import (
    ChainInverse,
    invert_conditional,
    precondition_chain,
    redamp_conditional,
)

T = TypeVar("T", bound=LayerInverse)
EigenOrFactors = EigenInverse | LayerFactors


class Structure(ABC, Generic[T]):
    """A structure of the inverse for layers `names`, in the order of the model; it has no state.

    `links` are the pairs of neighbours whose cross factors are averaged. If `observes_moments`,
    gradient workers compute moments in the `bases`, and `observe` averages them in.
    """

    observes_moments = False

    def __init__(
        self, settings: KFACSpec, names: Sequence[str], chain_links: Sequence[Link]
    ) -> None:
        self.links: tuple[Link, ...] = ()
        self._settings = settings
        self._names = tuple(names)

    @abstractmethod
    def invert(self, snapshot: LayerSnapshot, gamma: float) -> Inverted[T]:
        """Return a layer's inverse under damping of strength `gamma`.

        Raises:
            InversionFailedError: no rung of the ladder gave a finite inverse.
        """

    def invert_at_gammas(
        self, snapshot: LayerSnapshot, gammas: Sequence[float]
    ) -> list[Inverted[T] | None]:
        """Return a layer's inverse at each gamma, None where the inversion failed."""
        inverted: list[Inverted[T] | None] = []
        for gamma in gammas:
            try:
                inverted.append(self.invert(snapshot, gamma))
            except InversionFailedError:
                inverted.append(None)
        return inverted

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], pi: float, gamma: float) -> Inverted[T]:
        """Return the inverse that has these tensors; they are kept, not copied."""

    @abstractmethod
    def redamp(self, inverted: Inverted[T], gamma: float) -> Inverted[T]:
        """Return a layer's inverse at a larger gamma, from the inverse alone."""

    def bases(self, inverses: Mapping[str, Inverted[T]]) -> dict[str, KroneckerPair]:
        """Return the eigenbases in which gradient workers compute moments, by layer."""
        return {}

    def install(self, new: Inverted[T], current: Inverted[T] | None) -> Inverted[T]:
        """Return a new inverse with what it takes over from the layer's current one."""
        return new

    def observe(
        self, inverses: Mapping[str, Inverted[T]], moments: Mapping[str, Tensor], num_cases: int
    ) -> dict[str, Inverted[T]]:
        """Return the inverses with one step's sums of moments averaged in."""
        return dict(inverses)

    def precondition(
        self, matrices: Mapping[str, Tensor], inverses: Mapping[str, T], gamma: float
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the direction of each layer [dim_G, dim_A], and the layers that fell back.

        `matrices` are the gradients of all layers. See `precondition_layers` for the fallback.
        """
        return precondition_layers(matrices, inverses, gamma)


class BlockDiagonal(Structure[LayerFactors]):
    """`U_i = G_i^{-1} V_i A_i^{-1}` (docs/algorithm.md#block-diagonal), or unit by unit."""

    def invert(self, snapshot: LayerSnapshot, gamma: float) -> Inverted[LayerFactors]:
        """Invert the damped factors."""
        return invert_layer(snapshot.pair, gamma, self._settings.pi_norm)

    def restore(
        self, tensors: Mapping[str, Tensor], pi: float, gamma: float
    ) -> Inverted[LayerFactors]:
        """Return the inverse with tensors A and G, or M."""
        return Inverted(inverse=factors_from_tensors(tensors), pi=pi, gamma=gamma, rungs=())

    def redamp(self, inverted: Inverted[LayerFactors], gamma: float) -> Inverted[LayerFactors]:
        """Return the inverse at a larger gamma."""
        return redamp_layer(inverted, gamma)


class BlockTridiagonal(Structure[ChainInverse]):
    """Linked layers as chains, in module order (docs/algorithm.md#block-tridiagonal)."""

    def __init__(
        self, settings: KFACSpec, names: Sequence[str], chain_links: Sequence[Link]
    ) -> None:
        super().__init__(settings, names, chain_links)
        self.links = tuple(chain_links)

    def invert(self, snapshot: LayerSnapshot, gamma: float) -> Inverted[ChainInverse]:
        """Make the layer's part of the chain."""
        return invert_conditional(snapshot, gamma, self._settings.pi_norm)

    def restore(
        self, tensors: Mapping[str, Tensor], pi: float, gamma: float
    ) -> Inverted[ChainInverse]:
        """Return the part with these tensors."""
        inverse = ChainInverse.from_tensors(tensors)
        return Inverted(inverse=inverse, pi=pi, gamma=gamma, rungs=())

    def redamp(self, inverted: Inverted[ChainInverse], gamma: float) -> Inverted[ChainInverse]:
        """Return the layer's own block at a larger gamma, no longer linked with the next."""
        return redamp_conditional(inverted, gamma)

    def precondition(
        self, matrices: Mapping[str, Tensor], inverses: Mapping[str, ChainInverse], gamma: float
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Run the three passes over the chain."""
        return precondition_chain(matrices, inverses, self.links, gamma)


class EKFAC(Structure[EigenOrFactors]):
    """The eigenbasis of the factors, with measured moments in it (docs/algorithm.md#ekfac).

    Inverse workers make the basis; the owner of the inverses observes the moments. Only layers with
    two dense factors need a basis: a layer with a diagonal A, or with a Fisher block for each unit,
    is inverted as `BlockDiagonal` does.
    """

    observes_moments = True

    def invert(self, snapshot: LayerSnapshot, gamma: float) -> Inverted[EigenOrFactors]:
        """Decompose both factors, if both are dense."""
        factors = snapshot.pair
        if isinstance(factors, UnitMoments) or factors.A.dim() == 1:
            return invert_layer(factors, gamma, self._settings.pi_norm)
        return eigen_inverse(factors, gamma, self._settings.pi_norm)

    def invert_at_gammas(
        self, snapshot: LayerSnapshot, gammas: Sequence[float]
    ) -> list[Inverted[EigenOrFactors] | None]:
        """Decompose both factors once for all gammas."""
        (first,) = super().invert_at_gammas(snapshot, gammas[:1])
        if first is None:
            return [None] * len(gammas)
        if not isinstance(first.inverse, EigenInverse):
            return [first, *super().invert_at_gammas(snapshot, gammas[1:])]
        others = replace(first, rungs=())  # the ladder was climbed once
        return [first, *(self.redamp(others, gamma) for gamma in gammas[1:])]

    def restore(
        self, tensors: Mapping[str, Tensor], pi: float, gamma: float
    ) -> Inverted[EigenOrFactors]:
        """Return the inverse with this basis and these moments, or these inverted factors."""
        inverse = (
            EigenInverse.from_tensors(tensors, gamma)
            if "Q_A" in tensors
            else factors_from_tensors(tensors)
        )
        return Inverted(inverse=inverse, pi=pi, gamma=gamma, rungs=())

    def redamp(self, inverted: Inverted[EigenOrFactors], gamma: float) -> Inverted[EigenOrFactors]:
        """Return the inverse at a larger gamma; with a basis, its tensors stay the same."""
        if isinstance(inverted.inverse, EigenInverse):
            return at_gamma(cast(Inverted[EigenInverse], inverted), gamma)
        return redamp_layer(cast(Inverted[LayerFactors], inverted), gamma)

    def bases(self, inverses: Mapping[str, Inverted[EigenOrFactors]]) -> dict[str, KroneckerPair]:
        """Return the basis of every layer that has one."""
        return {
            name: inverted.inverse.basis
            for name, inverted in inverses.items()
            if isinstance(inverted.inverse, EigenInverse)
        }

    def install(
        self,
        new: Inverted[EigenOrFactors],
        current: Inverted[EigenOrFactors] | None,
    ) -> Inverted[EigenOrFactors]:
        """Return the new basis with the moments carried over to it."""
        if current is None or not isinstance(new.inverse, EigenInverse):
            return new
        assert isinstance(current.inverse, EigenInverse), "a layer stays of its kind"
        return replace(new, inverse=new.inverse.carrying(current.inverse))

    def observe(
        self,
        inverses: Mapping[str, Inverted[EigenOrFactors]],
        moments: Mapping[str, Tensor],
        num_cases: int,
    ) -> dict[str, Inverted[EigenOrFactors]]:
        """Return the inverses with the moments averaged in, for layers with a basis."""
        decay = self._settings.factor_decay
        return {
            name: replace(
                inverted, inverse=inverted.inverse.updated(moments[name], num_cases, decay)
            )
            if isinstance(inverted.inverse, EigenInverse)
            else inverted
            for name, inverted in inverses.items()
        }


def structure_for(
    settings: KFACSpec, names: Sequence[str], chain_links: Sequence[Link]
) -> Structure[Any]:
    """Return the structure that `settings.inverse` names, for the layers `names`.

    `chain_links` are the neighbours among them (`Registration.links`); only a block-tridiagonal
    inverse uses them.
    """
    structures: dict[str, type[Structure[Any]]] = {
        "block_diagonal": BlockDiagonal,
        "block_tridiagonal": BlockTridiagonal,
        "ekfac": EKFAC,
    }
    return structures[settings.inverse](settings, names, chain_links)
