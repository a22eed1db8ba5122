"""Evaluates the training and the test set; each gradient worker takes a part of the cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ray

from kfac_dist.data import Split
from kfac_dist.runs import Evaluation, Metrics
from workers.driver.crew.crew import Crew
from workers.exchange.messages import EvaluationSums

# An objective that grew by more than this times its start, and noticeably, is not noise.
_DIVERGED_GROWTH = 9.0
_NOTICEABLE = 0.01  # nats a case


def divergence(initial: float | None, final: float) -> str | None:
    """Return a sentence if the training made the objective far worse, None if it did not.

    Args:
        initial: the objective of the first step's batch, in nats a case; None if it is unknown.
        final: the objective over the training set at the end.
    """
    if not math.isfinite(final):
        return f"the training diverged: its objective ended at {final:g}"
    if initial is None or not math.isfinite(initial):
        return None
    if final - initial <= max(_DIVERGED_GROWTH * abs(initial), _NOTICEABLE):
        return None
    return (
        f"the training diverged: its objective began at {initial:.4g} and ended at {final:.4g}; "
        "try more damping, or a lower learning rate"
    )


def evaluate_splits(crew: Crew, l2: float) -> Evaluation:
    """Evaluate the current parameters on both splits, and the averaged parameters if any."""
    crew.share_buffers()
    (averaged,) = crew.gather(crew.call_server("averaged_parameters"))
    train = _evaluate_split(crew, "train", None, l2)
    test = _evaluate_split(crew, "test", None, l2)
    if averaged is None:
        return Evaluation(train=train, test=test)
    shared = ray.put(averaged)  # once, for all workers and both splits
    return Evaluation(
        train=train,
        test=test,
        train_averaged=_evaluate_split(crew, "train", shared, l2),
        test_averaged=_evaluate_split(crew, "test", shared, l2),
    )


def _evaluate_split(crew: Crew, split: Split, parameters: object, l2: float) -> Metrics:
    parts = crew.gather(crew.call_workers("evaluate", split, parameters))
    return _case_means(parts, l2)


def _case_means(parts: Sequence[EvaluationSums], l2: float) -> Metrics:
    """Return means over all cases: the metrics, `loss`, and `objective`, which adds the l2 term."""
    num_cases = sum(part.num_cases for part in parts)
    loss = sum(part.loss for part in parts) / num_cases
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    metrics = {
        name: sum(part.metrics.get(name, 0.0) for part in parts) / num_cases for name in names
    }
    return {"objective": loss + l2 * parts[0].half_square_norm, "loss": loss, **metrics}
