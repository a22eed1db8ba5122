import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.windows import WindowLength

SECONDS = st.floats(1e-5, 5.0)


def settled(step_seconds: float, overhead_seconds: float, windows: int = 20) -> WindowLength:
    """Windows whose steps and whose overhead always take the same time."""
    length = WindowLength()
    for _ in range(windows):
        own = [step_seconds] * length.steps
        length.note(sum(own) + overhead_seconds, own)
    return length


@given(SECONDS, st.floats(0.0, 0.1))
def test_a_window_lasts_at_most_a_second(step_seconds: float, overhead_seconds: float) -> None:
    steps = settled(step_seconds, overhead_seconds).steps
    assert steps == 1 or steps * step_seconds <= 1.0 + 1e-9


@given(st.floats(1e-4, 1.0), st.floats(0.0, 0.01))
def test_ordering_takes_at_most_a_hundredth_where_a_second_allows_it(
    step_seconds: float, overhead_seconds: float
) -> None:
    steps = settled(step_seconds, overhead_seconds).steps
    enough = overhead_seconds <= 1.001 * 0.01 * steps * step_seconds
    assert enough or (steps + 1) * step_seconds > 1.0 - 1e-9
    if steps > 1:
        assert overhead_seconds > 0.999 * 0.01 * (steps - 1) * step_seconds, "and is no longer"


@given(st.lists(st.tuples(SECONDS, st.lists(SECONDS, min_size=1, max_size=5)), min_size=1))
def test_a_window_has_at_most_four_times_the_steps_of_the_one_before(
    windows: list[tuple[float, list[float]]],
) -> None:
    length = WindowLength()
    assert length.steps == 1
    for overhead, steps in windows:
        length.note(sum(steps) + overhead, steps)
        assert 1 <= length.steps <= 4 * len(steps)


def test_one_disturbed_window_does_not_make_long_ones() -> None:
    length = settled(0.01, 1e-4)
    assert length.steps == 1
    length.note(0.01 + 0.5, [0.01])  # the machine did something else for half a second
    assert length.steps <= 2
    length.note(0.01 * length.steps + 1e-4, [0.01] * length.steps)
    assert length.steps == 1


def test_a_lasting_overhead_is_followed() -> None:
    length = settled(0.01, 1e-4)
    for _ in range(10):
        own = [0.01] * length.steps
        length.note(sum(own) + 5e-3, own)
    assert length.steps in (50, 51)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_steps_that_take_no_measurable_time_change_nothing(seconds: float) -> None:
    length = WindowLength()
    length.note(seconds, [0.0])
    assert length.steps == 1
