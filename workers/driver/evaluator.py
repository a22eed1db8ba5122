"""Evaluation of whole data sets, shared out over the gradient workers."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from kfac_dist.data import Split
from kfac_dist.runs import Evaluation, Metrics
from workers.driver.crew.crew import Crew
from workers.exchange.messages import EvaluationSums


def evaluate(crew: Crew, l2: float) -> Evaluation:
    """Evaluate the current parameters and, when there are any, the averaged ones."""
    crew.share_buffers()
    (averaged,) = crew.gather(crew.call_server("averaged_parameters"))
    train = _means(crew, "train", None, l2)
    test = _means(crew, "test", None, l2)
    if averaged is None:
        return Evaluation(train=train, test=test)
    shared = ray.put(averaged)
    return Evaluation(
        train=train,
        test=test,
        train_averaged=_means(crew, "train", shared, l2),
        test_averaged=_means(crew, "test", shared, l2),
    )


def _means(crew: Crew, split: Split, parameters: object, l2: float) -> Metrics:
    sums = crew.gather(crew.call_workers("evaluate", split, parameters))
    return means(sums, l2)


def means(sums: Sequence[EvaluationSums], l2: float) -> Metrics:
    """Return the means over all cases: `objective` with the l2 term, `loss` without, metrics."""
    num_cases = sum(one.num_cases for one in sums)
    loss = sum(one.loss for one in sums) / num_cases
    names = dict.fromkeys(name for one in sums for name in one.metrics)
    metrics = {name: sum(one.metrics.get(name, 0.0) for one in sums) / num_cases for name in names}
    return {"objective": loss + l2 * sums[0].half_square_norm, "loss": loss, **metrics}
