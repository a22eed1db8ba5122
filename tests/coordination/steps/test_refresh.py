import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.refresh import LayerRefreshState, RefreshPolicy, choose_next
from kfac_dist.errors import InvalidSpecError

POLICIES: tuple[RefreshPolicy, ...] = ("round_robin", "oldest_first", "largest_drift")


def layer(
    name: str,
    version: int | None,
    statistics_step: int = 10,
    drift: float = 0.0,
    cost: float = 1.0,
) -> LayerRefreshState:
    return LayerRefreshState(
        name=name, version=version, statistics_step=statistics_step, drift=drift, cost=cost
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("state", "why"),
    [
        (layer("a", version=10), "as new as requested"),
        (layer("a", version=11, statistics_step=12), "newer than requested"),
        (layer("a", version=8, statistics_step=8), "no newer statistics"),
        (layer("a", version=None, statistics_step=0), "no statistics at all"),
    ],
)
def test_no_layer_is_due(policy: RefreshPolicy, state: LayerRefreshState, why: str) -> None:
    assert choose_next([state], policy, 10) is None, why
    assert choose_next([], policy, 10) is None


@pytest.mark.parametrize(
    ("last_chosen", "expected"),
    [(None, "c"), ("c", "b"), ("b", "c"), ("a", "b"), ("unknown", "c")],
)
def test_round_robin_continues_after_the_last_one(last_chosen: str | None, expected: str) -> None:
    states = [layer("c", 1), layer("a", 10), layer("b", 9)]
    assert choose_next(states, "round_robin", 10, last_chosen) == expected


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([layer("a", 5), layer("b", 3), layer("c", 4)], "b"),
        ([layer("b", 3), layer("a", 3)], "a"),
        ([layer("a", 1), layer("b", None)], "b"),
    ],
)
def test_oldest_first(states: list[LayerRefreshState], expected: str) -> None:
    assert choose_next(states, "oldest_first", 10) == expected


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([layer("a", 5, drift=0.1), layer("b", 9, drift=0.2)], "b"),
        ([layer("a", 5, drift=0.1, cost=1), layer("b", 9, drift=0.2, cost=4)], "a"),
        ([layer("b", 5, drift=0.1), layer("a", 9, drift=0.1)], "a"),
        ([layer("a", 5, drift=99.0), layer("b", None)], "b"),
        ([layer("b", None), layer("a", None)], "a"),
        ([layer("a", 5, drift=99.0), layer("b", 5, cost=0.0)], "b"),
    ],
)
def test_largest_drift_for_its_cost(states: list[LayerRefreshState], expected: str) -> None:
    assert choose_next(states, "largest_drift", 10) == expected


@given(st.sampled_from(POLICIES), st.integers(1, 8), st.data())
def test_every_layer_is_refreshed_once_for_one_request(
    policy: RefreshPolicy, num_layers: int, data: st.DataObject
) -> None:
    states = {
        f"layer{i}": layer(
            f"layer{i}",
            data.draw(st.none() | st.integers(1, 9)),
            drift=data.draw(st.floats(0, 5)),
            cost=data.draw(st.floats(0.1, 5)),
        )
        for i in range(num_layers)
    }
    chosen: list[str] = []
    while (name := choose_next(list(states.values()), policy, 10, *chosen[-1:])) is not None:
        chosen.append(name)
        states[name] = layer(name, version=10)
    assert sorted(chosen) == sorted(states)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 0}, "version of fc must be at least 1; got 0"),
        ({"version": 1, "statistics_step": -1}, "statistics_step of fc must be at least 0; got -1"),
        ({"version": 1, "drift": float("nan")}, "drift of fc must be at least 0; got nan"),
        ({"version": 1, "cost": -0.5}, "cost of fc must be at least 0; got -0.5"),
    ],
)
def test_a_state_is_checked_at_birth(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        layer("fc", **fields)
