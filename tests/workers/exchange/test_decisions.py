"""Decisions survive the trip to the workers exactly, whatever is missing in them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from workers.exchange.decisions import MIRROR_SIZE, DecisionMirror
from workers.exchange.messages import StepDecision

APPLIED = StepDecision(
    applied=True,
    parameter_version=7,
    loss=1 / 3,
    objective=0.1 + 0.2,
    num_cases=50,
    alpha=-1e-17,
    mu=0.0,
    update_norm=math.pi,
    predicted_change=-1 / 7,
    reduction_ratio=None,
    damping=1e-300,
    gamma=1 / 9,
    lr=None,
    next_gammas=(1 / 9, 1 / 11, 1 / 13),
    fisher_noise=0.7,
    open_search=(1 / 9, 1 / 11),
    accepted_statistics=False,
    refused_in_a_row=3,
)
FIRST_ORDER = replace(
    APPLIED,
    alpha=None,
    mu=None,
    predicted_change=None,
    damping=None,
    gamma=None,
    lr=0.1,
    next_gammas=(),
    fisher_noise=None,
    open_search=(),
    accepted_statistics=None,
    refused_in_a_row=0,
)


def mirror(decision: StepDecision | None) -> DecisionMirror:
    return DecisionMirror(
        step=8, decision=decision, damping=0.1, gamma=1 / 3, fisher_noise=0.2, search=(0.3, 1 / 7)
    )


@pytest.mark.parametrize(
    "decision",
    [
        APPLIED,
        FIRST_ORDER,
        replace(APPLIED, accepted_statistics=True, reduction_ratio=math.inf),
        replace(APPLIED, applied=False, accepted_statistics=None, next_gammas=()),
        None,
    ],
)
def test_a_mirror_is_read_as_it_was_written(decision):
    written = mirror(decision)
    numbers = written.numbers()
    assert len(numbers) == MIRROR_SIZE
    assert all(isinstance(number, float) for number in numbers)
    again = DecisionMirror.from_numbers(numbers, last_step=8)
    assert again == written
    if decision is not None:
        assert isinstance(again.decision.num_cases, int)
        assert again.decision.accepted_statistics is decision.accepted_statistics


def test_the_loss_of_a_skipped_step_stays_nan():
    skipped = replace(APPLIED, applied=False, loss=math.nan, objective=math.nan)
    again = DecisionMirror.from_numbers(mirror(skipped).numbers(), last_step=8).decision
    assert math.isnan(again.loss)
    assert math.isnan(again.objective)
    assert replace(again, loss=0.0, objective=0.0) == replace(skipped, loss=0.0, objective=0.0)


def test_what_has_no_decision_is_of_the_step_that_the_reader_names():
    numbers = mirror(None).numbers()
    assert DecisionMirror.from_numbers(numbers, last_step=5).step == 5
    assert DecisionMirror.from_numbers(mirror(APPLIED).numbers(), last_step=5).step == 8
