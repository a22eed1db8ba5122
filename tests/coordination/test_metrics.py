from __future__ import annotations

from typing import Any

import pytest

from kfac_dist.coordination.metrics import CATALOGUE, Metric

CONTRACT = """\
gauge     kfac_step
gauge     kfac_loss
gauge     kfac_inverse_version_step{job,layer}
gauge     kfac_inverse_refresh_timestamp_seconds{job,layer}
gauge     kfac_inverse_queue_depth{job,worker}
histogram kfac_inversion_duration_seconds
counter   kfac_inversions_total{result}
gauge     kfac_damping
gauge     kfac_gamma
gauge     kfac_reduction_ratio
gauge     kfac_update_norm
counter   kfac_samples_total
gauge     kfac_step_duration_seconds{phase}
counter   kfac_numeric_events_total{rung}
counter   kfac_stale_applied_total
gauge     kfac_group_epoch
gauge     kfac_gradient_workers
gauge     kfac_shards
counter   kfac_worker_restarts_total{role}
gauge     kfac_build_info{version}
"""


def test_names_labels_and_kinds_are_those_of_the_contract() -> None:
    assert [line(metric) for metric in CATALOGUE] == CONTRACT.splitlines()


def line(metric: Metric) -> str:
    labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
    return f"{metric.kind:9} {metric.name}{labels}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "step"}, "kfac_ and words"),
        ({"name": "kfac_Step"}, "kfac_ and words"),
        ({"name": "kfac_steps_total"}, "just counters end in _total"),
        ({"kind": "counter"}, "just counters end in _total"),
        ({"name": "kfac_wait_seconds"}, "just seconds end in _seconds"),
        ({"unit": "seconds"}, "just seconds end in _seconds"),
        ({"labels": ("a-b",)}, "'a-b' is not a label"),
        ({"labels": ("le",)}, "Prometheus' own"),
        ({"labels": ("layer", "layer")}, "occurs twice"),
        ({"help": "The step"}, "is a sentence; got 'The step'"),
        ({"kind": "histogram"}, "just histograms have buckets"),
        ({"buckets": (1.0,)}, "just histograms have buckets"),
        ({"kind": "histogram", "buckets": (1.0, 1.0)}, r"must rise; got \(1.0, 1.0\)"),
    ],
)
def test_a_wrong_metric_is_refused(changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"name": "kfac_x", "kind": "gauge", "help": "What it is."}
    Metric(**right)
    with pytest.raises(AssertionError, match=message):
        Metric(**right | changes)
