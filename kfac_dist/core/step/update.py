"""The decisions of a step: step size, momentum, damping, gamma.

The serial optimizer and the first shard of the parameter server hold one `KFACUpdate`. It decides
from a few numbers of the whole vectors, and does not depend on where these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.passes.fisher import FisherMeans, fisher_fraction
from kfac_dist.core.step.block_numbers import DirectionNumbers
from kfac_dist.core.step.choice import Choice, skipped_choice
from kfac_dist.core.step.plane_model import PlaneModel, plane_models
from kfac_dist.core.step.step_rule import step_rule_for

_OMEGA = 19 / 20  # decay a step of damping (paper 6.5) and of gamma (paper 6.6)
_RATIO_GOOD, _RATIO_BAD = 3 / 4, 1 / 4


class KFACUpdate:
    """Damping and gamma, and the rules by which they move.

    `damping` is adapted (docs/algorithm.md#damping), stays fixed, or is set each step by a
    schedule. `gamma`, the strength of the factored damping, starts at sqrt(damping + l2) unless it
    is given; if the step rule searches for it (docs/algorithm.md#gamma), the search moves it,
    otherwise it follows the damping. `fisher_noise` is the noise of the last Fisher products
    along a direction, infinite before the first.
    """

    def __init__(self, settings: KFACSpec) -> None:
        self.settings = settings
        self.damping = settings.damping.first
        self.gamma = self._gamma_for(self.damping)
        self.fisher_noise = math.inf
        self._rule = step_rule_for(settings)
        self._search: tuple[float, ...] | None = None  # gammas of a search that is still open

    def _gamma_for(self, damping: float) -> float:
        """Return the gamma that goes with a damping if gamma is not searched for."""
        return self.settings.gamma.initial or self._bounded_gamma(
            math.sqrt(damping + self.settings.l2)
        )

    def _bounded_gamma(self, gamma: float) -> float:
        return min(max(gamma, self.settings.gamma.min), self.settings.gamma.max)

    def begin_step(self, damping: float | None) -> None:
        """Set the damping that a schedule gives for the step; None if no schedule does."""
        if damping is not None:
            self._set_damping(damping)

    def gammas(self, *, search: bool, damping: float | None = None) -> tuple[float, ...]:
        """Return the gammas to invert with: the current one, then one below and one above it.

        The other two are returned only if `search` is due (every T2 steps; they differ by the
        factor `w2 = (19/20)^(T2/2)`), and only if they still differ within the bounds. `damping`
        is the value that a schedule gives for a step that has not begun.
        """
        period = self._rule.gamma_search_period
        if period is None and damping is not None:
            return (self._gamma_for(self._bounded_damping(damping)),)
        if period is None or not search:
            return (self.gamma,)
        factor = _OMEGA ** (period / 2)
        tried = (self.gamma, factor * self.gamma, self.gamma / factor)
        return tuple(dict.fromkeys(self._bounded_gamma(gamma) for gamma in tried))

    @property
    def search_open(self) -> bool:
        """Whether a search for gamma is due that has not been decided."""
        return self._search is not None

    def requested_gammas(self, *, search: bool, damping: float | None = None) -> tuple[float, ...]:
        """Return the gammas to invert with in a step, including those of an open search."""
        return self.gammas(search=search or self.search_open, damping=damping)

    def wanted_gammas(self, *, search: bool) -> tuple[float, ...]:
        """Return the gammas of the search that is open, none if none is; `search` opens one."""
        if search:
            self._search = self.gammas(search=True)
        return self._search or ()

    def decide_search(self) -> None:
        """Note that the step in hand decides the open search."""
        self._search = None

    def tried_gammas(
        self, all_inverted_for: Callable[[Sequence[float]], bool], *, search: bool
    ) -> tuple[float, ...]:
        """Return the gammas a step tries: more than the current one when a search is decided.

        `search` opens a search. It is decided in the first step from then on for which
        `all_inverted_for` returns True: the layers' inverses for all gammas of the search are
        there.
        """
        wanted = self.wanted_gammas(search=search)
        if not wanted or not all_inverted_for(wanted):
            return (self.gamma,)
        self.decide_search()
        return wanted

    def fisher_fraction(self, num_cases: int, *, measure: bool) -> float | None:
        """Return the fraction of the batch for the exact Fisher products of a step.

        None if the step needs no Fisher products. `measure`: the step measures the reduction
        ratio.
        """
        if not (self._rule.needs_fisher or measure):
            return None
        return fisher_fraction(self.settings.fisher_fraction, self.fisher_noise, num_cases)

    def choose(
        self,
        numbers: DirectionNumbers,
        gammas: Sequence[float],
        fisher: FisherMeans | None,
        *,
        lr: float | None,
    ) -> Choice:
        """Choose the finite candidate with the lowest model value, its alpha and its mu.

        Gamma moves to that of the candidate, and `fisher_noise` to that of its products. If no
        candidate is finite, the choice is to apply nothing, and the damping is raised.

        Args:
            numbers: inner products of the gradient of the objective, of one direction a candidate,
                and of the previous update.
            gammas: the gamma of each candidate.
            fisher: Fisher products of the directions and, last, the previous update; None if
                `fisher_fraction` was None.
            lr: learning rate of the step, None under a rule that does not take one.
        """
        gram = None if fisher is None else fisher.gram
        models = plane_models(numbers, gram)
        tried = [
            self._choice(number, gamma, model, lr, has_fisher=fisher is not None)
            for number, (gamma, model) in enumerate(zip(gammas, models, strict=True))
            if model.is_finite()
        ]
        if not tried:
            self._raise_damping()
            return skipped_choice(self.gamma)
        # Without Fisher products there is no search, hence one candidate.
        best = min(tried, key=lambda choice: choice.predicted_change or 0.0)
        if self._searches_gamma:
            self.gamma = best.gamma
        if fisher is not None:
            self.fisher_noise = fisher.noise(best.candidate)
        return best

    @property
    def _searches_gamma(self) -> bool:
        return self._rule.gamma_search_period is not None

    def _choice(
        self, number: int, gamma: float, model: PlaneModel, lr: float | None, *, has_fisher: bool
    ) -> Choice:
        settings = self.settings
        ridge = self.damping + settings.l2
        alpha, mu = self._rule.coefficients(model, ridge=ridge, lr=lr)
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

    def adapt_damping(self, choice: Choice, actual_change: float) -> float | None:
        """Move the damping by the reduction ratio (docs/algorithm.md#damping), and return it.

        `actual_change` is h(theta + delta) - h(theta), l2 term included, on the batch of the step.
        A change that is not finite, or an objective that rose, counts as a ratio below 1/4. The
        ratio is None if it cannot be formed.
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
        if not self._searches_gamma:
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
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a copy of `state`."""
        self.damping = float(state["damping"])
        self.gamma = float(state["gamma"])
        self.fisher_noise = float(state["fisher_noise"])
        self._search = tuple(state["search"].tolist()) or None
