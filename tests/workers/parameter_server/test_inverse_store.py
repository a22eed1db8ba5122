"""The inverses of the server: which it accepts, waits for, keeps and damps."""

from __future__ import annotations

import threading

import pytest
import torch

from kfac_dist.config import KFACSpec, StalenessSpec
from kfac_dist.coordination.steps.plan import StepSchedule
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.factors import KroneckerPair, LayerSnapshot
from kfac_dist.core.inverse.damped import invert_pair
from kfac_dist.core.inverse.ekfac import EigenInverse
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.errors import TimedOutError
from workers.exchange.messages import InverseHeader, InverseMessage
from workers.exchange.moments import Moments
from workers.exchange.parcels import pack_inverses
from workers.parameter_server.inverse_store import InverseStore

DIMS = {"a": (3, 2), "b": (2, 2)}
LAYERS = tuple(DIMS)
SCHEDULE = StepSchedule(
    factor_update_period=1,
    inverse_update_period=4,
    gamma_adapt_period=None,
    damping_adapt_period=None,
)


def make_store(
    max_steps: int,
    at_bound: str = "wait",
    patience_seconds: float = 0.1,
    inverse: str = "block_diagonal",
):
    staleness = StalenessSpec(max_steps=max_steps, at_bound=at_bound)
    bound = StalenessBound(max_steps=max_steps, warmup_steps=0, schedule=SCHEDULE)
    store = InverseStore(
        layers=LAYERS,
        structure=structure_for(KFACSpec(inverse=inverse), LAYERS, []),
        bound=bound,
        staleness=staleness,
        patience_seconds=patience_seconds,
        device=torch.device("cpu"),
    )
    for step in range(1, 21):  # up to newer ones than in any inverse below
        store.note_statistics(step)
    return store


def factors(layer: str, version: int) -> KroneckerPair:
    A, G = ((1.0 + version) * torch.eye(order, dtype=torch.float64) for order in DIMS[layer])
    return KroneckerPair(A=A, G=G)


def publish(store: InverseStore, layer: str, version: int, *, fails: bool = False) -> None:
    inverted = invert_pair(factors(layer, version), 1.0)
    header = InverseHeader(
        layer=layer,
        version_step=version,
        gammas=(1.0,),
        pis=(None if fails else inverted.pi,),
        rungs=(),
        inversion_seconds=0.0,
    )
    parcel = pack_inverses([] if fails else [inverted])
    store.accept(InverseMessage(header=header, parcel=parcel))


def publish_all(store: InverseStore, version: int) -> None:
    for layer in LAYERS:
        publish(store, layer, version)


def test_what_arrived_is_reported_once_and_in_order():
    store = make_store(max_steps=8)
    publish_all(store, 4)
    publish(store, "a", 8, fails=True)
    headers = store.take_accepted()
    told = [(header.layer, header.version_step, header.pis.count(None)) for header in headers]
    assert told == [("a", 4, 0), ("b", 4, 0), ("a", 8, 1)]
    assert store.take_accepted() == ()


def versions(store: InverseStore, step: int) -> dict[str, int]:
    return {name: held.version_step for name, held in store.admit(step).held.items()}


def test_the_newest_version_wins_whatever_the_order_of_arrival():
    store = make_store(max_steps=10)
    publish_all(store, 3)
    publish_all(store, 7)
    publish(store, LAYERS[0], 5)
    assert versions(store, 8) == {"a": 7, "b": 7}


def test_a_step_at_the_bound_waits_until_the_inverse_arrives():
    store = make_store(max_steps=4, patience_seconds=20.0)
    publish_all(store, 1)
    assert store.admit(5).waited_seconds < 1
    late = threading.Timer(0.2, publish_all, (store, 4))
    late.start()
    admitted = store.admit(6)
    late.join()
    assert admitted.waited_seconds >= 0.1
    assert {held.version_step for held in admitted.held.values()} == {4}


def test_patience_ends_with_the_layers_that_are_missing():
    store = make_store(max_steps=4)
    publish(store, LAYERS[1], 1)
    with pytest.raises(TimedOutError, match="inverse of a came"):
        store.admit(2)


def test_orphaned_layers_are_not_waited_for_and_keep_their_last_inverse():
    store = make_store(max_steps=4)
    publish_all(store, 1)
    store.set_orphaned(["a", "b"])
    admission = store.admit(20).admission
    assert admission.degraded == ("a", "b")
    assert admission.stale == ("a", "b")


def test_a_synchronous_step_waits_for_orphaned_layers_unless_their_statistics_are_lost():
    store = make_store(max_steps=0)
    publish_all(store, 1)
    store.set_orphaned(["a", "b"])
    with pytest.raises(TimedOutError, match="inverse of a, b came"):
        store.admit(2)
    store.lose_statistics(["a", "elsewhere"], 2)
    publish(store, "b", 2)
    admission = store.admit(2).admission
    assert (admission.degraded, admission.wait_for) == (("a",), ())
    with pytest.raises(TimedOutError, match="inverse of a, b came"):
        store.admit(3)  # the next version can be made again


def test_beyond_the_bound_damping_grows_with_the_age():
    store = make_store(max_steps=4, at_bound="damp")
    publish_all(store, 1)
    admitted = store.install(store.admit(9))
    assert admitted.admission.damp == ("a", "b")
    inverse = store.at_gammas(admitted, [1.0]).by_gamma[1.0]["a"]
    expected = invert_pair(factors(LAYERS[0], 1), 2.0)
    assert inverse.gamma == 2.0
    torch.testing.assert_close(inverse.inverse.A, expected.inverse.A, rtol=1e-12, atol=0)
    torch.testing.assert_close(inverse.inverse.G, expected.inverse.G, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_steps", [0, 4])
def test_a_failed_inversion_keeps_the_last_good_inverse_and_is_counted(max_steps):
    store = make_store(max_steps=max_steps)
    publish_all(store, 4)
    publish(store, LAYERS[0], 8, fails=True)
    publish(store, LAYERS[1], 8)
    assert versions(store, 9) == {"a": 4, "b": 8}
    assert store.counts()["kept_inverse"] == 1


def test_a_synchronous_step_waits_for_the_refresh_after_a_failed_one():
    store = make_store(max_steps=0)
    publish_all(store, 4)
    publish(store, LAYERS[0], 8, fails=True)
    publish(store, LAYERS[1], 8)
    with pytest.raises(TimedOutError, match="a, b"):
        store.admit(12)
    publish_all(store, 12)
    assert versions(store, 12) == {"a": 12, "b": 12}


def eigen_store(gammas: tuple[float, ...] = (1.0, 2.0)):
    """A store of EKFAC's inverses, and a function that publishes one of layer `a`."""
    store = make_store(max_steps=10, inverse="ekfac")

    def publish_eigen(version: int) -> EigenInverse:
        rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(version)).double()
        pair = KroneckerPair(A=rows.T @ rows, G=rows[:, :2].T @ rows[:, :2])
        prepared = store.structure.invert_at_gammas(LayerSnapshot(step=version, pair=pair), gammas)
        header = InverseHeader(
            layer="a",
            version_step=version,
            gammas=gammas,
            pis=tuple(inverted.pi for inverted in prepared),
            rungs=(),
            inversion_seconds=0.0,
        )
        parcel = pack_inverses(prepared)
        assert set(parcel.shared) == {"Q_A", "Q_G", "moments"}
        store.accept(InverseMessage(header=header, parcel=parcel))
        return prepared[0].inverse

    return store, publish_eigen


def step(store: InverseStore, number: int, *, search_open: bool = False) -> None:
    store.set_orphaned(["b"])  # layer b never has an inverse here
    store.use(store.install(store.admit(number)), 1.0, search_open=search_open)


def in_use(store: InverseStore, gamma: float) -> EigenInverse:
    inverted = store.install(store.admit(1)).held["a"].nearest(gamma)
    assert inverted.inverse.gamma == inverted.gamma == gamma
    return inverted.inverse


def some_moments(version: int) -> dict[str, Moments]:
    return {"a": Moments(version_step=version, sums=torch.arange(6.0).double().view(2, 3) + 1)}


def test_moments_are_averaged_for_all_gammas_while_a_search_is_open():
    store, publish_eigen = eigen_store()
    first = publish_eigen(4)
    step(store, 4, search_open=True)
    store.observe(some_moments(4), num_cases=5)
    expected = first.updated(some_moments(4)["a"].sums, 5, KFACSpec().factor_decay)
    for gamma in (1.0, 2.0):
        assert torch.equal(in_use(store, gamma).moments, expected.moments)
        assert in_use(store, gamma).num_updates == 2
    step(store, 5)
    assert list(store.install(store.admit(6)).held["a"].by_gamma) == [1.0]


def test_moments_are_carried_over_once_to_each_new_basis():
    store, publish_eigen = eigen_store()
    publish_eigen(4)
    step(store, 4)
    assert store.bases()["a"].version_step == 4
    store.observe(some_moments(4), num_cases=5)
    old = in_use(store, 1.0)
    new = publish_eigen(8)
    assert store.bases()["a"].version_step == 4
    for number in (8, 9, 10):
        step(store, number)
        assert store.bases()["a"].version_step == 8
        assert torch.equal(in_use(store, 1.0).moments, new.carrying(old).moments)


def test_moments_that_are_not_finite_are_refused_and_counted():
    store, publish_eigen = eigen_store()
    first = publish_eigen(4)
    step(store, 4)
    bad = Moments(version_step=4, sums=torch.full((2, 3), torch.inf, dtype=torch.float64))
    store.observe({"a": bad}, num_cases=5)
    assert torch.equal(in_use(store, 1.0).moments, first.moments)
    assert store.counts()["refused_moments"] == 1


def test_a_snapshot_has_the_moments_and_what_the_next_step_would_use():
    store, publish_eigen = eigen_store()
    publish_eigen(4)
    step(store, 4)
    store.observe(some_moments(4), num_cases=5)
    publish_eigen(8)
    expected = in_use(store, 1.0)
    restored, _ = eigen_store()
    restored.set_orphaned(["b"])
    restored.restore(store.snapshot())
    found = in_use(restored, 1.0)
    assert restored.bases()["a"].version_step == 4, "in use until a step uses the newer one"
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)
