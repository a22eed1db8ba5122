import itertools
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.schedule import (
    GrowingBatch,
    Schedule,
    ScheduleKind,
    batch_size_at,
)
from kfac_dist.errors import InvalidSpecError


def growing(
    initial: int, full_at: int, kind: Literal["cosine", "exponential"] = "exponential"
) -> GrowingBatch:
    return GrowingBatch(kind=kind, initial=initial, full_at=full_at)


@pytest.mark.parametrize("num_cases", [20_000, 60_000, 103_500])
def test_the_paper_schedule(num_cases: int) -> None:
    """The three autoencoder problems: m_1 = 1000, the whole training set from step 500 on."""
    div = 499 / math.log2(num_cases / 1000)
    sizes = [batch_size_at(k, growing(1000, 500), num_cases) for k in range(1, 502)]
    paper = [min(1000 * 2 ** ((k - 1) / div), num_cases) for k in range(1, 502)]
    assert sizes == [round(size) for size in paper]
    assert (sizes[0], sizes[499], sizes[500]) == (1000, num_cases, num_cases)


def test_known_values_for_curves() -> None:
    assert [
        batch_size_at(k, growing(1000, 500), 20_000) for k in (1, 2, 100, 250, 499, 500, 10**6)
    ] == [
        1000,
        1006,
        1812,
        4459,
        19_880,
        20_000,
        20_000,
    ]


@pytest.mark.parametrize("kind", ["exponential", "cosine"])
@given(initial=st.integers(1, 5000), full_at=st.integers(1, 300), num_cases=st.integers(1, 5000))
def test_it_grows_from_initial_to_all_cases(
    kind: Literal["cosine", "exponential"], initial: int, full_at: int, num_cases: int
) -> None:
    batch = growing(initial, full_at, kind)
    sizes = [batch_size_at(step, batch, num_cases) for step in range(1, full_at + 2)]
    assert sizes == sorted(sizes)
    assert sizes[0] == (num_cases if full_at == 1 else min(initial, num_cases))
    assert sizes[full_at - 1] == num_cases


@given(st.integers(1, 10**6), st.integers(1, 5000))
def test_a_fixed_size_stays(step: int, batch_size: int) -> None:
    assert batch_size_at(step, batch_size, 100) == batch_size


@pytest.mark.parametrize(
    ("step", "batch_size", "num_cases", "message"),
    [
        (0, 10, 100, "step must be at least 1; got 0"),
        (1, 0, 100, "batch_size must be at least 1; got 0"),
        (1, growing(0, 5), 100, "batch_size.initial must be at least 1; got 0"),
        (1, growing(5, 0), 100, "batch_size.full_at must be at least 1; got 0"),
        (1, 10, 0, "num_cases must be at least 1; got 0"),
    ],
)
def test_numbers_below_one_are_refused(
    step: int, batch_size: int | GrowingBatch, num_cases: int, message: str
) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        batch_size_at(step, batch_size, num_cases)


KINDS = st.sampled_from(["constant", "cosine", "exponential"])
VALUES = st.floats(1e-9, 1e9)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind: ScheduleKind = draw(KINDS)
    warmup_steps = draw(st.integers(0, 40))
    return Schedule(
        kind=kind,
        initial=draw(VALUES),
        final=draw(VALUES | st.just(0.0) if kind == "cosine" else VALUES),
        steps=draw(st.integers(warmup_steps + 1, 200)),
        warmup_steps=warmup_steps,
    )


@given(schedules())
def test_a_schedule_has_its_ends(schedule: Schedule) -> None:
    start = max(schedule.warmup_steps, 1)
    if schedule.kind == "constant":
        assert schedule.value(start) == schedule.value(10**6) == schedule.initial
        return
    if start < schedule.steps:
        assert schedule.value(start) == pytest.approx(schedule.initial, rel=1e-12)
    assert schedule.value(schedule.steps) == schedule.value(10**6) == schedule.final


@given(schedules())
def test_a_schedule_goes_one_way_and_no_farther(schedule: Schedule) -> None:
    start = max(schedule.warmup_steps, 1)
    values = [schedule.value(step) for step in range(start, schedule.steps + 2)]
    end = schedule.initial if schedule.kind == "constant" else schedule.final
    low, high = sorted((schedule.initial, end))
    sign = 1 if end >= schedule.initial else -1
    rounding = 1e-12 * high
    assert all(sign * (b - a) >= -rounding for a, b in itertools.pairwise(values))
    assert all(low - rounding <= value <= high + rounding for value in values)


@given(schedules())
def test_the_warm_up_is_a_line_from_zero(schedule: Schedule) -> None:
    for step in range(1, schedule.warmup_steps):
        share = step / schedule.warmup_steps
        assert schedule.value(step) == pytest.approx(share * schedule.initial)


def test_halfway_cosine_is_the_mean_and_exponential_the_geometric_mean() -> None:
    common: dict[str, Any] = {"initial": 4.0, "final": 1.0, "steps": 11}
    assert Schedule(kind="cosine", **common).value(6) == pytest.approx(2.5)
    assert Schedule(kind="exponential", **common).value(6) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "exponential", "final": 0.0, "steps": 5}, "initial and final above 0; got 1 and"),
        ({"kind": "cosine", "final": 0.0, "steps": 0}, "steps must be at least 1; got 0"),
        (
            {"kind": "cosine", "final": 0.0, "steps": 5, "warmup_steps": 5},
            "steps must be at least 6; got 5",
        ),
        (
            {"kind": "constant", "final": 1.0, "steps": 1, "warmup_steps": -1},
            "warmup_steps must be at least 0; got -1",
        ),
    ],
)
def test_a_schedule_that_leads_nowhere_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        Schedule(initial=1.0, **values)
