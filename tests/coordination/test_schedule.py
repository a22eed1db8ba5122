import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.schedule import batch_size_at
from kfac_dist.errors import InvalidSpecError


@pytest.mark.parametrize("num_cases", [20_000, 60_000, 103_500])
def test_the_paper_schedule(num_cases: int) -> None:
    """The three autoencoder problems: m_1 = 1000, the whole training set from step 500 on."""
    div = 499 / math.log2(num_cases / 1000)
    sizes = [batch_size_at(k, (1000, 500), num_cases) for k in range(1, 502)]
    paper = [min(1000 * 2 ** ((k - 1) / div), num_cases) for k in range(1, 502)]
    assert sizes == [round(size) for size in paper]
    assert (sizes[0], sizes[499], sizes[500]) == (1000, num_cases, num_cases)


def test_known_values_for_curves() -> None:
    assert [batch_size_at(k, (1000, 500), 20_000) for k in (1, 2, 100, 250, 499, 500, 10**6)] == [
        1000,
        1006,
        1812,
        4459,
        19_880,
        20_000,
        20_000,
    ]


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 5000))
def test_it_grows_from_initial_to_all_cases(initial: int, full_at: int, num_cases: int) -> None:
    sizes = [batch_size_at(step, (initial, full_at), num_cases) for step in range(1, full_at + 2)]
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
        (1, (0, 5), 100, "batch_size.initial must be at least 1; got 0"),
        (1, (5, 0), 100, "batch_size.full_at must be at least 1; got 0"),
        (1, 10, 0, "num_cases must be at least 1; got 0"),
    ],
)
def test_numbers_below_one_are_refused(
    step: int, batch_size: int | tuple[int, int], num_cases: int, message: str
) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        batch_size_at(step, batch_size, num_cases)
