"""The runner asks the cluster that it was given, and dead nodes do not confuse it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import AttemptKey
from kfac_dist.errors import UnreachableError
from tests.workers.cluster.jobs_api_server import CLUSTER_ID, JobsApi, jobs_api
from workers.cluster.job_runner import RayJobRunner


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsApi]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with jobs_api() as made:
        yield made


def node(name: str, state: str, cpus: float) -> dict[str, Any]:
    return {
        "node_id": name,
        "node_ip": "10.0.0.1",
        "is_head_node": name == "a",
        "state": state,
        "state_message": None,
        "node_name": name,
        "resources_total": {"CPU": cpus, "inverse": cpus} if state == "ALIVE" else {},
        "labels": {},
        "start_time_ms": 1,
        "end_time_ms": 0,
    }


def test_dead_nodes_have_no_room_and_stop_nothing(api: JobsApi) -> None:
    runner = RayJobRunner(api.url)
    api.nodes = [node("a", "ALIVE", 2.0), node("b", "ALIVE", 2.0)]
    assert runner.resources() == Room(num_cpus=4, num_gpus=0, num_inverse_slots=4)
    api.nodes[1] = node("b", "DEAD", 2.0)
    assert runner.resources() == Room(num_cpus=2, num_gpus=0, num_inverse_slots=2)


@pytest.mark.parametrize("own", [None, "127.0.0.1:7777"])
def test_a_driver_is_told_its_cluster(api: JobsApi, own: str | None) -> None:
    api.command = ["raylet", "--gcs-address=10.0.0.1:6379", "--x=--gcs-address=no"]
    RayJobRunner(api.url, gcs_address=own, driver=("run",)).submit(
        AttemptKey("job", 2), Path("/runs/a b")
    )
    (submitted,) = api.submitted
    assert submitted["submission_id"] == "job-a2"
    assert shlex.split(submitted["entrypoint"]) == [
        *("exec", "run", "/runs/a b", "2", "--ray-cluster", CLUSTER_ID),
        *("--ray-address", own or "10.0.0.1:6379"),
    ]


def test_the_id_alone_is_enough_where_the_address_is_not_known_yet(api: JobsApi) -> None:
    RayJobRunner(api.url, driver=("run",)).submit(AttemptKey("job", 1), Path("/r"))
    assert api.submitted[0]["entrypoint"] == f"exec run /r 1 --ray-cluster {CLUSTER_ID}"


@pytest.mark.parametrize("status", [401, 403, 500])
def test_an_api_that_refuses_is_unreachable(api: JobsApi, status: int) -> None:
    runner = RayJobRunner(api.url)
    api.nodes = [node("a", "ALIVE", 2.0)]
    runner.resources()
    api.status = status
    with pytest.raises(UnreachableError, match="Ray's Jobs API at"):
        runner.submit(AttemptKey("job", 1), Path("/r"))
