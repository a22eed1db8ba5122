import math
from itertools import combinations_with_replacement, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.assignment import (
    DEFAULT_COST_MODEL,
    Assignment,
    CostModel,
    LayerCost,
    assign,
    assign_runs,
    fit_cost_model,
    reassign,
)
from kfac_dist.errors import InvalidSpecError

MODEL = CostModel(cubic=1e-11, quadratic=1e-8)
LAYER = LayerCost(name="fc", orders=(2, 2))


def autoencoder() -> list[LayerCost]:
    """The layers of the paper's autoencoder for MNIST."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    return [
        LayerCost(name=f"{i}", orders=(widths[i] + 1, widths[i + 1]))
        for i in range(len(widths) - 1)
    ]


def layer_lists(max_size: int) -> st.SearchStrategy[list[LayerCost]]:
    orders = st.lists(st.integers(1, 60), max_size=2).map(tuple)
    return st.lists(orders, min_size=1, max_size=max_size).map(
        lambda layers: [LayerCost(name=f"layer{i}", orders=own) for i, own in enumerate(layers)]
    )


def loads(assignment: Assignment, layers: list[LayerCost]) -> dict[int, float]:
    seconds = {layer.name: MODEL.layer_seconds(layer) for layer in layers}
    return {worker: sum(seconds[n] for n in names) for worker, names in assignment.items()}


def names_of(assignment: Assignment) -> list[str]:
    return sorted(name for names in assignment.values() for name in names)


def owners(assignment: Assignment) -> dict[str, int]:
    return {name: worker for worker, names in assignment.items() for name in names}


@given(layer_lists(12), st.integers(1, 6))
def test_every_layer_is_assigned_once(layers: list[LayerCost], num_workers: int) -> None:
    found = assign(layers, num_workers, MODEL)
    assert list(found) == list(range(num_workers))
    assert names_of(found) == sorted(layer.name for layer in layers)
    order = [layer.name for layer in layers]
    assert all(list(names) == sorted(names, key=order.index) for names in found.values())


@given(layer_lists(6), st.integers(1, 3))
def test_the_most_loaded_worker_is_within_grahams_bound(
    layers: list[LayerCost], num_workers: int
) -> None:
    seconds = [MODEL.layer_seconds(layer) for layer in layers]
    best = min(
        max(
            sum(s for s, owner in zip(seconds, choice, strict=True) if owner == worker)
            for worker in range(num_workers)
        )
        for choice in product(range(num_workers), repeat=len(layers))
    )
    found = max(loads(assign(layers, num_workers, MODEL), layers).values())
    assert found <= (4 / 3 - 1 / (3 * num_workers)) * best * (1 + 1e-12)


@given(layer_lists(9), st.integers(1, 5))
def test_runs_are_consecutive_and_no_others_have_a_smaller_largest_load(
    layers: list[LayerCost], num_workers: int
) -> None:
    found = assign_runs(layers, num_workers, MODEL)
    assert [name for names in found.values() for name in names] == [layer.name for layer in layers]
    assert list(found) == list(range(num_workers))
    seconds = [MODEL.layer_seconds(layer) for layer in layers]
    best = min(
        max(sum(seconds[start:stop]) for start, stop in pairwise((0, *cuts, len(layers))))
        for cuts in combinations_with_replacement(range(len(layers) + 1), num_workers - 1)
    )
    assert max(loads(found, layers).values()) <= best * (1 + 1e-12)


def test_the_autoencoder_as_a_chain_on_three_inverse_workers() -> None:
    assert assign_runs(autoencoder(), [4, 5, 6]) == {
        4: ("0",),
        5: ("1", "2", "3", "4", "5"),
        6: ("6", "7"),
    }


def test_the_autoencoder_on_two_inverse_workers() -> None:
    """Longest first: 7 and 0, then 1 and 6, 2 and 5, 3 and 4; each pair is split."""
    assert assign(autoencoder(), 2) == {0: ("2", "3", "6", "7"), 1: ("0", "1", "4", "5")}


def test_equals_go_in_the_given_order() -> None:
    layers = [LayerCost(name=name, orders=(8, 8)) for name in "dbac"]
    assert assign(layers, [7, 3], MODEL) == {7: ("d", "a"), 3: ("b", "c")}


@given(layer_lists(12), st.integers(2, 5), st.data())
def test_when_a_worker_leaves_only_its_layers_move(
    layers: list[LayerCost], num_workers: int, data: st.DataObject
) -> None:
    before = assign(layers, num_workers, MODEL)
    gone = data.draw(st.integers(0, num_workers - 1))
    stay = [worker for worker in range(num_workers) if worker != gone]
    after = reassign(before, layers, stay, MODEL)
    assert names_of(after) == names_of(before)
    assert all(set(before[worker]) <= set(after[worker]) for worker in stay)


@given(layer_lists(12), st.integers(1, 5), st.integers(1, 2))
def test_when_workers_join_layers_move_to_them_only_and_no_load_grows(
    layers: list[LayerCost], num_workers: int, num_joining: int
) -> None:
    before = assign(layers, num_workers, MODEL)
    after = reassign(before, layers, range(num_workers + num_joining), MODEL)
    assert names_of(after) == names_of(before)
    assert all(set(after[worker]) <= set(before[worker]) for worker in before)
    most = max(loads(before, layers).values())
    assert max(loads(after, layers).values()) <= most * (1 + 1e-12)
    if sum(bool(layer.orders) for layer in layers) > 1 and num_workers == 1:
        assert after[num_workers]


def test_a_layer_does_not_move_for_nothing() -> None:
    assert reassign({0: ("fc",)}, [LAYER], [0, 1], MODEL) == {0: ("fc",), 1: ()}


@given(layer_lists(12), st.integers(1, 5))
def test_nothing_moves_when_the_workers_are_the_same(
    layers: list[LayerCost], num_workers: int
) -> None:
    before = assign(layers, num_workers, MODEL)
    assert reassign(before, layers, range(num_workers), MODEL) == before


def test_when_all_workers_are_new_the_layers_are_assigned_afresh() -> None:
    layers = autoencoder()
    afresh = assign(layers, [5, 6])
    assert reassign(assign(layers, 2), layers, [5, 6]) == afresh


def test_a_new_layer_is_placed_and_a_forgotten_one_is_left_out() -> None:
    layers = [LayerCost(name=name, orders=(8, 8)) for name in ("kept", "new")]
    before = {0: ("kept", "forgotten"), 1: ()}
    assert reassign(before, layers, [0, 1]) == {0: ("kept",), 1: ("new",)}


@given(
    st.floats(1e-13, 1e-9),
    st.floats(1e-10, 1e-6),
    st.lists(st.integers(1, 3000), min_size=2, max_size=8, unique=True),
)
def test_a_fit_finds_the_coefficients_of_exact_times(
    cubic: float, quadratic: float, dims: list[int]
) -> None:
    truth = CostModel(cubic=cubic, quadratic=quadratic)
    found = fit_cost_model([(dim, truth.matrix_seconds(dim)) for dim in dims])
    largest = truth.matrix_seconds(max(dims))
    for dim in dims:
        assert found.matrix_seconds(dim) == pytest.approx(
            truth.matrix_seconds(dim), rel=1e-6, abs=1e-9 * largest
        )


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(1e-6, 10)), min_size=1, max_size=8),
)
def test_a_fit_is_never_negative_and_never_empty(samples: list[tuple[int, float]]) -> None:
    found = fit_cost_model(samples)
    assert found.cubic >= 0
    assert found.quadratic >= 0
    assert found.matrix_seconds(100) > 0


def test_times_that_would_need_a_negative_term() -> None:
    only_quadratic = fit_cost_model([(10, 1.0), (100, 2.0)])
    assert only_quadratic.cubic == 0
    faster_than_cubic = fit_cost_model([(10, 1e-9), (100, 1.0), (200, 16.0)])
    assert faster_than_cubic.quadratic == 0


def test_one_order_alone_is_taken_as_cubic() -> None:
    assert fit_cost_model([(100, 1.0), (100, 3.0)]).matrix_seconds(200) == pytest.approx(16)


def test_the_default_model_is_the_fit_to_the_measured_times() -> None:
    measured = [(256, 0.0004), (512, 0.0061), (1024, 0.0383), (2048, 0.2013)]
    found = fit_cost_model(measured)
    assert found.cubic == pytest.approx(DEFAULT_COST_MODEL.cubic, rel=0.05)
    assert found.quadratic == pytest.approx(DEFAULT_COST_MODEL.quadratic, rel=0.05)


def test_wrong_numbers_and_names_are_refused() -> None:
    with pytest.raises(InvalidSpecError, match="matrix of fc must be at least 1; got 0"):
        LayerCost(name="fc", orders=(1, 0))
    with pytest.raises(InvalidSpecError, match="cubic must be at least 0; got -1"):
        CostModel(cubic=-1, quadratic=0)
    with pytest.raises(InvalidSpecError, match="inverse workers must be at least 1; got 0"):
        assign([LAYER], 0)
    with pytest.raises(InvalidSpecError, match="layer fc is given more than once"):
        assign([LAYER, LAYER], 1)
    with pytest.raises(InvalidSpecError, match="inverse worker 3 is given more than once"):
        assign([LAYER], [3, 3])
    with pytest.raises(InvalidSpecError, match="inverse workers must be at least 1; got 0"):
        assign_runs([LAYER], 0)
    with pytest.raises(InvalidSpecError, match="layer fc is given more than once"):
        assign_runs([LAYER, LAYER], 1)
    with pytest.raises(InvalidSpecError, match="at least 1 measured"):
        fit_cost_model([])
    with pytest.raises(
        InvalidSpecError, match="seconds of order 7 must be above 0 and finite; got 0"
    ):
        fit_cost_model([(7, 0)])
    with pytest.raises(InvalidSpecError, match="finite; got inf"):
        fit_cost_model([(7, math.inf)])
