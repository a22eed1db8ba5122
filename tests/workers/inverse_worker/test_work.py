"""An inverse worker averages statistics exactly once, refuses bad ones, inverts what is due."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kfac_dist.coordination.steps.assignment import DEFAULT_COST_MODEL, LayerCost
from kfac_dist.coordination.steps.recorded import InverseUse, RecordedInverses, ReplayScript
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.statistics.sums import BatchStatistics
from tests.waiting import wait_until
from tests.workers.whole_jobs.local_job import job_context, small_spec
from workers.exchange.messages import (
    InverseSetup,
    RefreshRequest,
    StatisticsHeader,
    StatisticsMessage,
)
from workers.exchange.parcels import pack_statistics
from workers.inverse_worker.loop import InverseLoop
from workers.inverse_worker.work import InverseWork

RECORDING = ReplayScript(
    inverses=RecordedInverses(
        uses={
            "a": [InverseUse(first_step=6, version_step=4, gammas=(3.0,))],
            "b": [InverseUse(first_step=3, version_step=2, gammas=(1.0, 2.0))],
        },
        beyond_bound={},
    ),
    checkpoint_steps=frozenset(),
    evaluation_steps=frozenset(),
)
LAYERS = (LayerCost(name="a", orders=(4, 3)), LayerCost(name="b", orders=(3, 2)))


@pytest.fixture
def make(tmp_path):
    def build(replay_script: ReplayScript | None = None, **sections) -> InverseWork:
        sections = {"staleness": {"max_steps": 40}} | sections
        spec = small_spec(workers={"gradient": 2, "inverse": 1}, **sections)
        setup = InverseSetup(
            rank=0,
            layers=LAYERS,
            links=(),
            cost_model=DEFAULT_COST_MODEL,
            assignment_epoch=1,
            applied_step=0,
            exact_step=0,
        )
        return InverseWork(replace(job_context(spec, tmp_path), replay_script=replay_script), setup)

    return build


def message(
    step: int,
    *names: str,
    usable: bool = True,
    job: str = "local",
    bad: bool = False,
    epoch: int = 1,
):
    """The sums of a step for the layers of these names."""
    factors = {}
    for number, layer in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(100 * step + number)
        rows = [
            torch.randn(6, order, dtype=torch.float64, generator=generator)
            for order in layer.orders
        ]
        if bad:
            rows[0][0, 0] = float("nan")
        if layer.name in names:
            factors[layer.name] = KroneckerPair(A=rows[0].T @ rows[0], G=rows[1].T @ rows[1])
    statistics = BatchStatistics(factors=factors, crosses={}, moments={})
    header = StatisticsHeader(
        job=job,
        step=step,
        num_cases=6,
        layers=names,
        assignment_epoch=epoch,
        usable=usable,
    )
    parcel = pack_statistics(statistics) if usable else None
    return StatisticsMessage(header=header, parcel=parcel)


def deliver(work: InverseWork, *messages) -> dict[str, bytes]:
    for message in messages:
        work.receive(message)
        work.apply_statistics()
    return {name: array.tobytes() for name, array in work.snapshot().items()}


IN_ORDER = [message(step, name) for step in (1, 2, 3) for name in ("a", "b")]


def test_duplicated_and_late_statistics_change_nothing(make):
    expected = deliver(make(), *IN_ORDER)
    work = make()
    repeated = [IN_ORDER[0], *IN_ORDER[:3], IN_ORDER[2], *IN_ORDER[3:], *IN_ORDER]
    assert deliver(work, *repeated) == expected
    status = work.status(queue_depth=0)
    assert (work.handled_step, status.duplicates + status.late) == (3, 8)


def test_layers_may_arrive_in_any_order_and_together(make):
    expected = deliver(make(), *IN_ORDER)
    swapped = [IN_ORDER[i] for i in (1, 0, 2, 3, 5, 4)]
    assert deliver(make(), *swapped) == expected
    assert deliver(make(), *(message(step, "b", "a") for step in (1, 2, 3))) == expected


def test_a_step_that_is_repeated_may_come_in_other_pieces(make):
    """A gradient worker died when it had sent its sums and the others had not."""
    work = make()
    pieces = [message(1, "a"), message(1, "a", "b"), *IN_ORDER[2:]]
    assert deliver(work, *pieces) == deliver(make(), *IN_ORDER)
    assert work.status(0).dropped == 0


def test_a_step_of_which_a_layer_never_came_is_dropped(make):
    work = make()
    deliver(work, *IN_ORDER[:2], IN_ORDER[2], *IN_ORDER[4:])
    assert (work.handled_step, work.status(0).dropped) == (3, 1)
    deliver(work, IN_ORDER[3])
    assert work.status(0).late == 1


@pytest.mark.parametrize("strange", [{"job": "other"}, {"epoch": 2}], ids=str)
def test_statistics_for_another_job_or_another_worker_are_ignored(make, strange):
    work = make()
    deliver(work, *(message(1, name, **strange) for name in ("a", "b")))
    assert work.status(0).foreign == 2
    assert work.handled_step == 0


def test_layers_that_this_worker_does_not_own_are_ignored(make):
    work = make()
    foreign = message(1, "a", "b")
    header = replace(foreign.header, layers=("a", "b", "c"))
    deliver(work, replace(foreign, header=header))
    assert work.status(0).foreign == 1
    assert work.handled_step == 0


@pytest.mark.parametrize("how", [{"usable": False}, {"bad": True}])
def test_statistics_that_are_not_finite_are_refused_and_counted(make, how):
    work = make()
    before = deliver(work, *IN_ORDER[:2])
    assert deliver(work, message(2, "a"), message(2, "b", **how)) == before
    assert work.status(0).refused == 1
    assert work.handled_step == 2


@pytest.mark.parametrize("policy", ["round_robin", "oldest_first", "largest_drift"])
def test_each_request_is_served_once_for_every_layer(make, policy):
    work = make(staleness={"max_steps": 0, "refresh_policy": policy})
    deliver(work, *IN_ORDER[:2])
    work.request(RefreshRequest(step=1, gammas=(1.0, 2.0), min_statistics_step=1))
    served = [work.invert_next() for _ in range(3)]
    assert {m.header.layer for m in served[:2]} == {"a", "b"}
    assert served[2] is None
    assert all(m.header.version_step == 1 and len(m.header.pis) == 2 for m in served[:2])


def test_a_synchronous_request_waits_for_its_statistics(make):
    work = make()
    work.request(RefreshRequest(step=2, gammas=(1.0,), min_statistics_step=2))
    deliver(work, *IN_ORDER[:2])
    assert work.invert_next() is None
    deliver(work, *IN_ORDER[2:4])
    assert work.invert_next().header.version_step == 2


def test_a_recorded_request_is_for_some_layers_with_gammas_of_their_own(make):
    work = make(replay_script=RECORDING)
    statistics = {step: [message(step, "b", "a")] for step in (1, 2, 3, 4)}
    deliver(work, *statistics[1], *statistics[2], *statistics[3])
    assert work.handled_step == 2  # the first inverse is of step 2
    work.request(recorded_request(2))
    assert not work.is_settled
    first = work.invert_next().header
    assert (first.layer, first.version_step, first.gammas) == ("b", 2, (1.0, 2.0))
    assert work.status(0).queue_depth == 0  # nothing is requested of layer a
    assert work.invert_next() is None
    assert work.is_settled
    assert work.handled_step == 3
    deliver(work, *statistics[4])
    work.request(recorded_request(4))
    second = work.invert_next().header
    assert (second.layer, second.version_step, second.gammas) == ("a", 4, (3.0,))
    assert work.invert_next() is None


def recorded_request(step: int) -> RefreshRequest:
    return RefreshRequest(
        step=step,
        gammas=(9.0,),
        min_statistics_step=step,
        exact=True,
        gammas_by_layer=RECORDING.inverses.refresh(step),
    )


def test_a_snapshot_does_not_wait_for_another_letter_after_the_last_inversion(make):
    published = []
    loop = InverseLoop(make(staleness={"max_steps": 0}), published.append)
    for statistics in IN_ORDER[:2]:
        loop.put_statistics(statistics)
    loop.put_request(RefreshRequest(step=1, gammas=(1.0,), min_statistics_step=1, exact=True))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(loop.snapshot, 1, 20.0)
        wait_until(lambda: loop.status().queue_depth == 4, "the request for the snapshot", 20.0)
        loop.start()
        snapshot = asked.result()
    loop.stop()
    assert len(published) == len(LAYERS)
    assert int(snapshot["a:step"]) == 1
