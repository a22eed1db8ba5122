"""Evaluates the training and the test set; each gradient worker takes a part of the cases."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import ray

from kfac_dist.data import Split
from kfac_dist.runs import Evaluation, Metrics
from workers.driver.crew.crew import Crew
from workers.driver.records.journal import JobJournal
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


def evaluate_splits(crew: Crew, journal: JobJournal, l2: float) -> Evaluation:
    """Evaluate the current parameters on both splits, and the averaged parameters if any.

    The journal receives how far a long evaluation is.
    """
    evaluator = _Evaluator(crew, journal, l2)
    crew.share_buffers()
    averaged = crew.averaged_parameters()
    train, test = evaluator.evaluate("train", None), evaluator.evaluate("test", None)
    if averaged is None:
        return Evaluation(train=train, test=test)
    shared = ray.put(averaged)  # once, for all workers and both splits
    return Evaluation(
        train=train,
        test=test,
        train_averaged=evaluator.evaluate("train", shared),
        test_averaged=evaluator.evaluate("test", shared),
    )


class _Evaluator:
    """Has the workers evaluate until every case is done, and says how far they are."""

    def __init__(self, crew: Crew, journal: JobJournal, l2: float) -> None:
        self._crew = crew
        self._journal = journal
        self._l2 = l2
        self._num_reports = 0

    def evaluate(self, split: Split, parameters: object) -> Metrics:
        """Return the means over the cases of a split, with `parameters` if they are given."""
        started = time.monotonic()
        parts: list[EvaluationSums] = []
        while not parts or any(part.num_left for part in parts):
            if parts:
                self._report(split, parts, time.monotonic() - started)
            parts = self._crew.gather(self._crew.call_workers("evaluate", split, parameters, parts))
        return _case_means(parts, self._l2)

    def _report(self, split: Split, parts: Sequence[EvaluationSums], seconds: float) -> None:
        done = sum(part.num_cases for part in parts)
        total = done + sum(part.num_left for part in parts)
        message = (
            f"evaluating: {done:,} of {total:,} cases of the {split} data set are read after "
            f"{seconds:.0f} s"
        )
        first = self._num_reports == 0
        self._num_reports += 1
        if first:
            message += "; evaluation.limit makes evaluations shorter"
        self._journal.event("evaluating", message, severity="warning" if first else "info")


def _case_means(parts: Sequence[EvaluationSums], l2: float) -> Metrics:
    """Return means over all cases: the metrics, `loss`, and `objective`, which adds the l2 term."""
    num_cases = sum(part.num_cases for part in parts)
    loss = sum(part.loss for part in parts) / num_cases
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    metrics = {
        name: sum(part.metrics.get(name, 0.0) for part in parts) / num_cases for name in names
    }
    return {"objective": loss + l2 * parts[0].half_square_norm, "loss": loss, **metrics}
