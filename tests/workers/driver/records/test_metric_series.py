"""From records to the text that Prometheus reads."""

from __future__ import annotations

import math
import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kfac_dist import __version__
from kfac_dist.coordination.metrics import CATALOGUE
from kfac_dist.runs import Event, Inversion, StepRecord
from tests.workers.whole_jobs.scraping import by_label, samples, value
from workers.driver.records.metric_series import JobSeries

JOB = "line-0badcafe"


def text_of(series: JobSeries) -> str:
    registry = CollectorRegistry()
    registry.register(series)
    return generate_latest(registry).decode()


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "time": 1000.0 + step,
        "loss": 2.5,
        "objective": 3.0,
        "num_cases": 20,
        "update_norm": 0.1,
        "step_seconds": 0.25,
        "phase_seconds": {"compute": 0.125},
        "damping": 30.0,
        "gamma": 6.0,
        "parameter_version": step,
        "epoch": 1,
        "gradient_workers": 3,
        "shards": 3,
        "inverse_version_step": {"0": 1, 'odd "\\name': 1},
        "inverse_queue_depth": {"0": 2, "1": 0},
        "numeric_events": {"float64": 1},
        "stale_applied_total": 4,
    }
    return StepRecord.model_validate(values | changes)


def inversion(seconds: float, result: str = "ok") -> Inversion:
    return Inversion.model_validate({"layer": "0", "seconds": seconds, "result": result})


@pytest.fixture
def series() -> JobSeries:
    series = JobSeries(JOB)
    series.on_record(record(1, reduction_ratio=0.75, inversions=[inversion(0.002)]))
    return series


def test_the_text_is_the_catalogue(series: JobSeries) -> None:
    parsed = text_string_to_metric_families(text_of(series))
    families = {family.name: family for family in parsed}
    assert families.keys() == {metric.name.removesuffix("_total") for metric in CATALOGUE}
    for metric in CATALOGUE:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels)


def test_before_the_first_step_only_counts_are_there() -> None:
    found = samples(text_of(JobSeries(JOB)))
    assert value(found, "kfac_build_info", version=__version__) == 1
    assert by_label(found, "kfac_inversions_total", "result") == dict.fromkeys(
        ("ok", "rescued", "failed"), 0
    )
    assert value(found, "kfac_worker_restarts_total", role="inverse_worker") == 0
    assert value(found, "kfac_samples_total") == 0
    assert ("kfac_step", frozenset()) not in found


def test_numbers_of_the_last_record_and_sums_over_all(series: JobSeries) -> None:
    series.on_record(record(2, loss=math.nan, num_cases=30, numeric_events={"bad_step": 1}))
    found = samples(text_of(series))
    assert value(found, "kfac_step") == 2
    assert math.isnan(value(found, "kfac_loss"))
    assert value(found, "kfac_reduction_ratio") == 0.75  # measured in step 1
    assert value(found, "kfac_samples_total") == 50
    assert value(found, "kfac_stale_applied_total") == 4
    phases = by_label(found, "kfac_step_duration_seconds", "phase")
    assert phases == {"step": 0.25, "compute": 0.125}
    assert by_label(found, "kfac_numeric_events_total", "rung") == {"bad_step": 1}


def test_a_refresh_is_dated_by_the_step_that_first_used_it(series: JobSeries) -> None:
    series.on_record(record(2, inverse_version_step={}))  # a skipped step uses none
    series.on_record(record(3, inverse_version_step={"0": 1, 'odd "\\name': 2}))
    found = samples(text_of(series))
    versions = by_label(found, "kfac_inverse_version_step", "layer")
    assert versions == {"0": 1, 'odd "\\name': 2}
    times = by_label(found, "kfac_inverse_refresh_timestamp_seconds", "layer")
    assert times == {"0": 1001, 'odd "\\name': 1003}
    assert set(by_label(found, "kfac_inverse_version_step", "job")) == {JOB}


def test_the_queue_of_a_worker_that_is_gone_is_no_longer_served(series: JobSeries) -> None:
    series.on_record(record(2, inverse_queue_depth={"1": 3}))
    found = samples(text_of(series))
    assert by_label(found, "kfac_inverse_queue_depth", "worker") == {"1": 3}


def test_inversions_by_result_and_duration(series: JobSeries) -> None:
    later = [inversion(0.001), inversion(200.0, "rescued"), inversion(0.0, "failed")]
    series.on_record(record(2, inversions=later))
    found = samples(text_of(series))
    results = by_label(found, "kfac_inversions_total", "result")
    assert results == {"ok": 2, "rescued": 1, "failed": 1}
    buckets = by_label(found, "kfac_inversion_duration_seconds_bucket", "le")
    assert (buckets["0.001"], buckets["0.003"], buckets["100.0"], buckets["+Inf"]) == (2, 3, 3, 4)
    assert value(found, "kfac_inversion_duration_seconds_count") == 4
    assert value(found, "kfac_inversion_duration_seconds_sum") == pytest.approx(200.003)


def test_restarts_are_counted_by_role(series: JobSeries) -> None:
    for kind in ("inverse_worker_died", "inverse_worker_replaced", "checkpoint"):
        series.on_event(Event(kind=kind, message=kind, step=1, role="inverse_worker", rank=0))
    for kind in ("member_died", "member_joined", "member_left", "member_died"):
        series.on_event(Event(kind=kind, message=kind, step=1, role="gradient_worker", rank=0))
    found = samples(text_of(series))
    assert by_label(found, "kfac_worker_restarts_total", "role") == {
        "inverse_worker": 1,
        "gradient_worker": 2,
        "parameter_server": 0,
    }


def test_the_size_of_the_group_is_that_of_the_last_step(series: JobSeries) -> None:
    series.on_record(record(2, epoch=4, gradient_workers=2, shards=1))
    found = samples(text_of(series))
    names = ("kfac_group_epoch", "kfac_gradient_workers", "kfac_shards")
    assert [value(found, name) for name in names] == [4, 2, 1]


def test_a_baseline_has_no_series_of_kfac() -> None:
    series = JobSeries(JOB)
    series.on_record(
        record(1, damping=None, gamma=None, inverse_version_step={}, inverse_queue_depth={})
    )
    names = {name for name, _ in samples(text_of(series))}
    assert "kfac_loss" in names
    assert not names & {"kfac_damping", "kfac_gamma", "kfac_inverse_version_step"}


def test_promtool_has_no_complaint(series: JobSeries) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs Prometheus' promtool on the PATH")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text_of(series), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
