"""From a server's report to a record."""

from __future__ import annotations

import pytest

from workers.driver.crew.processes import GroupShape
from workers.driver.records.step_records import StepRecords
from workers.exchange.messages import InverseHeader, ServerReport, Traffic, WorkerReport


def report(*accepted: InverseHeader) -> ServerReport:
    return ServerReport(
        step=1,
        applied=True,
        loss=2.0,
        objective=2.5,
        num_cases=20,
        parameter_version=1,
        alpha=None,
        mu=None,
        update_norm=0.1,
        predicted_change=None,
        reduction_ratio=None,
        damping=1.0,
        gamma=1.0,
        lr=None,
        next_gammas=(1.0,),
        inverse_version_step={"a": 1},
        inverse_gammas={"a": (1.0, 2.0)},
        stale_layers={},
        accepted=accepted,
        stale_applied_total=0,
        numeric_events={},
        waited_seconds=0.0,
        phase_seconds={},
        step_seconds=0.5,
        time=1.7e9,
    )


SHAPE = GroupShape(epoch=2, gradient_workers=3, shards=4)


def header(pis: tuple[float | None, ...], rungs: tuple[str, ...] = ()) -> InverseHeader:
    return InverseHeader(
        layer="a",
        version_step=1,
        gammas=(1.0, 2.0),
        pis=pis,
        rungs=rungs,
        inversion_seconds=0.25,
    )


@pytest.mark.parametrize(
    ("accepted", "result"),
    [
        (header((1.0, 1.0)), "ok"),
        (header((1.0, 1.0), ("float64",)), "rescued"),
        (header((1.0, None)), "failed"),
        (header((None, 1.0), ("float64", "raised_damping")), "failed"),
    ],
)
def test_the_result_of_an_inversion(accepted: InverseHeader, result: str) -> None:
    traffic = Traffic(sent_bytes=70, received_bytes=30, num_messages=6)
    workers = [WorkerReport(phase_seconds={}, traffic=traffic)]
    record = StepRecords().record(report(accepted), workers, {}, SHAPE)
    assert (record.step_seconds, record.time) == (0.5, 1.7e9)
    assert (record.epoch, record.gradient_workers, record.shards) == (2, 3, 4)
    assert not record.incomplete
    assert (record.exchanged_bytes, record.num_messages) == (100, 6)
    (inversion,) = record.inversions
    assert (inversion.layer, inversion.seconds, inversion.result) == ("a", 0.25, result)


def test_a_step_whose_reports_were_lost_is_incomplete() -> None:
    record = StepRecords().record(report(), (), {}, SHAPE, is_incomplete=True)
    assert record.incomplete
    assert (record.exchanged_bytes, record.phase_seconds["compute"]) == (0, 0.0)
