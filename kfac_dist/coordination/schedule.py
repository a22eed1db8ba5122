"""Batch sizes over the steps. What is due in a step is counted in `plan.py`."""

from __future__ import annotations

from kfac_dist.coordination.checks import check_interval


def batch_size_at(step: int, batch_size: int | tuple[int, int], num_cases: int) -> int:
    """Return the number of cases in the batch of `step`, counted from 1.

    A fixed size is returned as it is. `(initial, full_at)` is the paper's exponential schedule
    (algorithm.md section 11), `m_k = initial (num_cases / initial)^((k - 1) / (full_at - 1))`,
    rounded: `initial` cases in step 1, all from step `full_at` on. An `initial` above `num_cases`
    means all cases in every step.

    Raises:
        InvalidSpecError: a number is below 1.
    """
    check_interval("step", step, 1)
    check_interval("num_cases", num_cases, 1)
    if isinstance(batch_size, int):
        check_interval("batch_size", batch_size, 1)
        return batch_size
    initial, full_at = batch_size
    check_interval("batch_size.initial", initial, 1)
    check_interval("batch_size.full_at", full_at, 1)
    if step >= full_at or initial >= num_cases:
        return num_cases
    growth: float = (num_cases / initial) ** ((step - 1) / (full_at - 1))
    return min(round(initial * growth), num_cases)
