"""The parameter server's part of the algorithm: direction, step, damping, gamma.

The serial optimizer and the parameter server both hold one `KFACUpdate`; it owns damping, gamma
and the previous update, and knows nothing of who computed the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.inverse.precondition import LayerInverse, matrices_of, write_matrices
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.passes.fisher import FisherMeans, fisher_fraction
from kfac_dist.core.products import RoundedCopies
from kfac_dist.core.step.step_rule import (
    Choice,
    PlaneModel,
    adaptive_coefficients,
    combine,
    constrained_step,
    plane_models,
)

_OMEGA = 19 / 20  # the paper's decay a step, of damping (section 6.5) and gamma (section 6.6)
_RATIO_GOOD, _RATIO_BAD = 3 / 4, 1 / 4


def searches_gamma(settings: KFACSpec) -> bool:
    """Tell whether gamma is searched for (section 10) or follows the damping."""
    return settings.step_rule == "adaptive" and settings.gamma.adapt_period is not None


class KFACUpdate:
    """Damping, gamma, previous update, and the rules by which they move.

    `gamma` is the strength of the factored damping; it starts at sqrt(damping + l2) unless given,
    is searched for under the adaptive rule, and follows damping where it is not searched for.
    `fisher_noise` is that of the last Fisher products along a direction, infinite before the first.
    Damping is adapted, stays, or is given step by step by a schedule.
    """

    def __init__(
        self, settings: KFACSpec, registration: Registration, previous_update: Tensor
    ) -> None:
        self.settings = settings
        self.damping = settings.damping.first
        self.gamma = self._gamma_for(self.damping)
        self.previous_update = previous_update
        self.fisher_noise = math.inf
        self._search: tuple[float, ...] | None = None
        self._blocks = registration.blocks
        self._copies = RoundedCopies() if settings.precondition_dtype == "bfloat16" else None
        self._structure = structure_for(settings, registration.names, registration.links)

    def _gamma_for(self, damping: float) -> float:
        """Return the gamma that goes with a damping where none is searched for."""
        return self.settings.gamma.initial or self._bounded_gamma(
            math.sqrt(damping + self.settings.l2)
        )

    def _bounded_gamma(self, gamma: float) -> float:
        return min(max(gamma, self.settings.gamma.min), self.settings.gamma.max)

    def begin_step(self, damping: float | None) -> None:
        """Take over the damping that a schedule gives for a step; None where none does."""
        if damping is not None:
            self._set_damping(damping)

    def gammas(self, *, search: bool, damping: float | None = None) -> tuple[float, ...]:
        """Return the gammas to invert with: the current one, then one below and one above it.

        The other two only when `search` is due (every T2 steps, `w2 = (19/20)^(T2/2)`), and only
        where the bounds leave them different. `damping` is what a schedule gives for a step that
        has not begun.
        """
        if damping is not None and not searches_gamma(self.settings):
            return (self._gamma_for(self._bounded_damping(damping)),)
        period = self.settings.gamma.adapt_period
        if not (search and searches_gamma(self.settings) and period is not None):
            return (self.gamma,)
        factor = _OMEGA ** (period / 2)
        tried = (self.gamma, factor * self.gamma, self.gamma / factor)
        return tuple(dict.fromkeys(self._bounded_gamma(gamma) for gamma in tried))

    @property
    def search_open(self) -> bool:
        """Tell whether a search for gamma is due that has not been decided."""
        return self._search is not None

    def requested_gammas(self, *, search: bool, damping: float | None = None) -> tuple[float, ...]:
        """Return the gammas to invert with in a step; those of an open search, too."""
        return self.gammas(search=search or self.search_open, damping=damping)

    def tried_gammas(
        self, carried: Callable[[Sequence[float]], bool], *, search: bool
    ) -> tuple[float, ...]:
        """Return the gammas a step tries: more than the current one when a search is decided.

        That is in the first step from which `search` is due on whose inverses carry all gammas
        of the search, which `carried` tells.
        """
        if search:
            self._search = self.gammas(search=True)
        if self._search is None or not carried(self._search):
            return (self.gamma,)
        tried, self._search = self._search, None
        return tried

    def directions(
        self,
        gradient: Tensor,
        inverses: Sequence[Mapping[str, LayerInverse]],
        gammas: Sequence[float],
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return one direction for each set of inverses, [C, P].

        Also the layers that fell back to the gradient in any of them.
        """
        matrices = matrices_of(gradient, self._blocks)
        if self._copies is not None:
            inverses = self._copies.round(inverses)
        tried = [
            self._structure.solve(matrices, by_layer, gamma)
            for by_layer, gamma in zip(inverses, gammas, strict=True)
        ]
        directions = gradient.new_empty((len(tried), len(gradient)))
        for direction, (solved, _) in zip(directions, tried, strict=True):
            write_matrices(solved, self._blocks, direction)
        fallen = dict.fromkeys(name for _, names in tried for name in names)
        return directions, tuple(fallen)

    def fisher_fraction(self, num_cases: int, *, measure: bool) -> float | None:
        """Return on which fraction of a batch a step needs the exact Fisher products.

        None where it needs none.
        """
        if self.settings.step_rule != "adaptive" and not measure:
            return None
        return fisher_fraction(self.settings.fisher_fraction, self.fisher_noise, num_cases)

    def choose(
        self,
        gradient: Tensor,
        directions: Tensor,
        gammas: Sequence[float],
        fisher: FisherMeans | None,
        *,
        lr: float | None,
    ) -> Choice:
        """Choose the finite candidate with the lowest model value, its alpha and its mu.

        `fisher` has the products of the directions and, last, the previous update; None where
        `fisher_fraction` is. `lr` bounds alpha; None under the adaptive rule. Moves gamma to the
        candidate's, and takes in the noise of its products.
        """
        gram = None if fisher is None else fisher.gram
        models = plane_models(gradient, directions, self.previous_update, gram)
        tried = [
            self._choice(number, gamma, model, lr, has_fisher=fisher is not None)
            for number, (gamma, model) in enumerate(zip(gammas, models, strict=True))
            if model.is_finite()
        ]
        if not tried:
            self._raise_damping()
            return Choice(
                candidate=0,
                gamma=self.gamma,
                alpha=0.0,
                mu=0.0,
                update_norm=0.0,
                predicted_change=None,
                prediction_for_ratio=None,
                applied=False,
            )
        best = min(tried, key=lambda choice: choice.predicted_change or 0.0)
        if searches_gamma(self.settings):
            self.gamma = best.gamma
        if fisher is not None:
            self.fisher_noise = fisher.noise(best.candidate)
        return best

    def _choice(
        self, number: int, gamma: float, model: PlaneModel, lr: float | None, *, has_fisher: bool
    ) -> Choice:
        settings = self.settings
        ridge = self.damping + settings.l2
        if settings.step_rule == "adaptive":
            alpha, mu = adaptive_coefficients(model, ridge)
        else:
            assert lr is not None, "the norm constraint needs an lr"
            alpha = constrained_step(lr, settings.norm_constraint, -model.slopes[0])
            mu = settings.momentum
        included = ridge if settings.damping.rho_includes_damping else settings.l2
        return Choice(
            candidate=number,
            gamma=gamma,
            alpha=alpha,
            mu=mu,
            update_norm=math.sqrt(model.square_norm(alpha, mu)),
            predicted_change=model.change(alpha, mu, ridge) if has_fisher else None,
            prediction_for_ratio=model.change(alpha, mu, included) if has_fisher else None,
        )

    def advance(self, choice: Choice, directions: Tensor) -> Tensor:
        """Return the update [P] of a choice and remember it as the previous update."""
        self.previous_update = combine(
            directions[choice.candidate], self.previous_update, choice.alpha, choice.mu
        )
        return self.previous_update

    def adapt_damping(self, choice: Choice, actual_change: float) -> float | None:
        """Move the damping by the reduction ratio (section 9) and return the ratio.

        `actual_change` is h(theta + delta) - h(theta), l2 term included, on the batch of the step.
        A change that is not finite, or an objective that rose, counts as a ratio below 1/4; the
        ratio is None when it cannot be formed.
        """
        predicted = choice.prediction_for_ratio
        ratio: float | None = None
        if predicted is not None and predicted < 0 and math.isfinite(actual_change):
            ratio = actual_change / predicted
        period = self.settings.damping.adapt_period
        if period is None:
            return ratio
        if ratio is None or ratio < _RATIO_BAD:
            self._raise_damping()
        elif ratio > _RATIO_GOOD:
            self._set_damping(self.damping * _OMEGA**period)
        return ratio

    def _raise_damping(self) -> None:
        period = self.settings.damping.adapt_period
        if period is not None:
            self._set_damping(self.damping / _OMEGA**period)

    def _set_damping(self, damping: float) -> None:
        self.damping = self._bounded_damping(damping)
        if not searches_gamma(self.settings):
            self.gamma = self._gamma_for(self.damping)

    def _bounded_damping(self, damping: float) -> float:
        return min(max(damping, self.settings.damping.min), self.settings.damping.max)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state, by flat names."""
        return {
            "damping": torch.tensor(self.damping, dtype=torch.float64),
            "gamma": torch.tensor(self.gamma, dtype=torch.float64),
            "fisher_noise": torch.tensor(self.fisher_noise, dtype=torch.float64),
            "search": torch.tensor(self._search or (), dtype=torch.float64),
            "previous_update": self.previous_update.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state."""
        self.damping = float(state["damping"])
        self.gamma = float(state["gamma"])
        self.fisher_noise = float(state["fisher_noise"])
        self._search = tuple(state["search"].tolist()) or None
        self.previous_update = state["previous_update"].clone()
