"""One Ray cluster for all tests of this folder, started by the first test that uses it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An initialised Ray with 4 CPUs and room for 4 inverse workers."""
    import ray

    from workers.cluster.guard import guarded
    from workers.cluster.ray_internals import on_loopback, patient_start, quiet_stdout

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        folder = tempfile.mkdtemp(prefix="kfac-", dir="/tmp")
        with guarded(Path(folder)), quiet_stdout():
            with on_loopback(), patient_start():
                ray.init(
                    address="local",
                    num_cpus=4,
                    resources={"inverse": 4},
                    include_dashboard=False,
                    object_store_memory=200_000_000,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                )
            yield
            ray.shutdown()


@pytest.fixture
def processes(cluster: None) -> Iterator[None]:
    """Check that no actor outlives the test."""
    yield
    from tests.waiting import wait_until
    from tests.workers.whole_jobs.jobs import actors_alive

    wait_until(lambda: not actors_alive(), "the end of all actors")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
