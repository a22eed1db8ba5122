"""Numeric trouble is counted as in the serial optimizer (docs/algorithm.md#ladder)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kfac_dist.config import StalenessSpec
from kfac_dist.coordination.steps.assignment import DEFAULT_COST_MODEL, LayerCost
from kfac_dist.coordination.steps.staleness import StalenessBound
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.statistics.sums import BatchStatistics
from tests.core.inverse.troubled_factors import EVENTS, FACTORS, GAMMA, LADDER
from tests.workers.whole_jobs.local_job import LocalJob, job_context, small_spec
from workers.exchange.messages import (
    InverseSetup,
    RefreshRequest,
    StatisticsHeader,
    StatisticsMessage,
)
from workers.exchange.parcels import pack_statistics, unpack_tensors
from workers.inverse_worker.work import InverseWork
from workers.parameter_server.inverse_store import InverseStore
from workers.planning import step_schedule

LAYER = LayerCost(name="0", orders=(4, 2))


def pack(factors):
    return pack_statistics(BatchStatistics(factors=factors, crosses={}, moments={}))


def message(step, pair):
    header = StatisticsHeader(
        job="local",
        step=step,
        num_cases=1,
        layers=("0",),
        assignment_epoch=1,
        usable=pair.is_finite(),
    )
    parcel = pack({"0": pair}) if header.usable else None
    return StatisticsMessage(header=header, parcel=parcel)


def both_sides(spec, folder):
    setup = InverseSetup(
        rank=0,
        layers=(LAYER,),
        links=(),
        cost_model=DEFAULT_COST_MODEL,
        assignment_epoch=1,
        applied_step=0,
        exact_step=0,
    )
    work = InverseWork(job_context(spec, folder), setup)
    store = InverseStore(
        layers=["0"],
        structure=structure_for(spec.optimizer, ["0"], []),
        bound=StalenessBound(max_steps=0, warmup_steps=0, schedule=step_schedule(spec)),
        staleness=StalenessSpec(max_steps=0),
        patience_seconds=1.0,
        device=torch.device("cpu"),
    )
    return work, store


def test_an_inverse_worker_and_the_store_count_trouble_like_the_serial_optimizer(tmp_path):
    work, store = both_sides(small_spec(optimizer={"factor_decay": 0.0}), tmp_path)
    expected: Counter[str] = Counter()
    for step, (trouble, rungs) in enumerate(LADDER, start=1):
        work.receive(message(step, FACTORS[trouble]))
        work.apply_statistics()
        work.request(
            RefreshRequest(step=step, gammas=(GAMMA,), min_statistics_step=step, exact=True)
        )
        if (inverse := work.invert_next()) is not None:
            store.accept(inverse)
        expected.update(rungs)
        counted = store.counts()
        counted["refused_statistics"] += work.status(queue_depth=0).refused
        assert +counted == expected, trouble


@pytest.mark.parametrize("failing", [(GAMMA,), (GAMMA, 1.0, 2.0)])
def test_a_failure_counts_once_for_each_gamma(failing, tmp_path):
    work, store = both_sides(small_spec(), tmp_path)
    work.receive(message(1, FACTORS["hopeless"]))
    work.apply_statistics()
    work.request(RefreshRequest(step=1, gammas=(*failing, 1e12), min_statistics_step=1, exact=True))
    store.accept(work.invert_next())
    assert store.counts()["no_inverse"] == len(failing)


class Spoiled(LocalJob):
    """Its inverse workers receive factors that no damping makes invertible."""

    def _send(self, step, messages):
        super()._send(step, {rank: [self._spoil(m) for m in own] for rank, own in messages.items()})

    def _spoil(self, message):
        if not message.header.usable:
            return message
        orders = {
            name: {key: len(tensor) for key, tensor in unpack_tensors(arrays).items()}
            for name, arrays in message.parcel.factors.items()
        }
        factors = {
            name: KroneckerPair(A=-1e12 * torch.eye(order["A"]), G=torch.eye(order["G"]))
            for name, order in orders.items()
        }
        return replace(message, parcel=pack(factors))


def test_the_server_counts_fallbacks_to_the_gradient_and_skipped_steps(tmp_path):
    job = Spoiled(small_spec(steps=4), tmp_path)
    num_layers = len(job.registration.names)
    (report,) = job.steps(1)
    assert report.applied
    assert report.numeric_events == {"no_inverse": num_layers, "gradient_fallback": num_layers}
    with torch.no_grad():
        job.workers[0]._parameters[0].fill_(math.nan)
    (report,) = job.steps(1)
    job.close()
    assert not report.applied
    assert report.numeric_events["bad_step"] == 1
    assert set(report.numeric_events) <= EVENTS


class Refused(LocalJob):
    """The statistics of its first gradient worker are not finite while `refuses` is true."""

    refuses = True

    def spoil(self):
        computer = self.workers[0]._computer
        alone = computer.statistics

        def statistics(*arguments, **options):
            result = alone(*arguments, **options)
            if self.refuses:
                next(result.tensors()).fill_(math.nan)
            return result

        computer.statistics = statistics


def test_the_server_counts_refused_statistics_in_a_row(tmp_path, caplog):
    job = Refused(small_spec(steps=8, workers={"gradient": 2, "inverse": 1}), tmp_path)
    first = job.steps(1)[0]
    assert first.refused_in_a_row == 0
    job.spoil()
    assert [report.refused_in_a_row for report in job.steps(3)] == [1, 2, 3]
    job.refuses = False
    assert [report.refused_in_a_row for report in job.steps(1)] == [0]
    job.close()
    (record,) = caplog.records
    assert "not finite in layers" in record.message
