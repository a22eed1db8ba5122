"""When are the inverse workers asked for new inverses, and for which?"""

from __future__ import annotations

from collections.abc import Callable

from kfac_dist.coordination.steps.plan import StepPlan
from kfac_dist.coordination.steps.staleness import StalenessBound
from workers.exchange.messages import RefreshRequest

SendRequest = Callable[[RefreshRequest], None]
"""Sends a request to all inverse workers."""


class RefreshRequests:
    """Sends the requests that are due, through `send`; the deciding shard knows the gammas."""

    def __init__(self, bound: StalenessBound, send: SendRequest) -> None:
        self._bound = bound
        self._send = send

    def send(self, plan: StepPlan, gammas: tuple[float, ...]) -> None:
        """Ask for a refresh with `gammas` if the plan, or the replayed run, has one here."""
        recorded = self._bound.recorded
        by_layer = None if recorded is None else recorded.refresh(plan.step)
        if not (plan.refresh_inverses if by_layer is None else by_layer):
            return
        exact = self._bound.is_exact(plan.step)
        self._send(
            RefreshRequest(
                step=plan.step,
                gammas=gammas,
                min_statistics_step=plan.step if exact else 1,
                exact=exact,
                gammas_by_layer=by_layer,
            )
        )
