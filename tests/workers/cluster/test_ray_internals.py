"""Each patch of Ray checks what it needs, and says which guarantee is lost without it."""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from kfac_dist.errors import UnreachableError
from kfac_dist.supported import RAY
from workers.cluster import ray_internals
from workers.cluster.ray_internals import PATCHES

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}  # the last is the first, seen from IPv6
NEEDS = [(name, internal) for name, patch in PATCHES.items() for internal in patch.needs]
# What a message names, so that the user knows what is lost.
LOST = {
    "on_loopback": "the cluster would listen on all network interfaces",
    "use_token": "the cluster would not ask for a token",
    "patient_start": "a node has 30 s to start",
    "free_agent_port": "a second cluster on this machine has no Jobs API",
    "quiet_stdout": "Ray writes the deaths of workers to standard output",
    "whole_connection": "Ctrl-C while connecting",
    "dead_daemons": "a cluster that has lost a daemon is not noticed",
    "live_daemons": "a daemon of Ray that is stopped is not noticed",
    "cluster_id_of": "a job and its code could go to another cluster",
}
PROTECTING = ("on_loopback", "use_token", "cluster_id_of")


def use(name: str, tmp_path: Path) -> None:
    """Apply the patch as its callers do."""
    patch: Callable[..., Any] = getattr(ray_internals, name)
    if name == "use_token":
        patch(tmp_path / "token")
        return
    if name == "cluster_id_of":
        patch("127.0.0.1:1")
        return
    if name == "dead_daemons":
        assert patch() == []
        return
    if name == "live_daemons":
        assert isinstance(patch(), dict)
        return
    block: AbstractContextManager[Any] = patch()
    with block:
        pass


def check_that_it_is_lost(
    name: str, problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(os.environ)
    ray_internals._warn_once.cache_clear()
    if name in PROTECTING:
        with pytest.raises(UnreachableError) as caught:
            use(name, tmp_path)
        said = caught.value.message
    else:
        with caplog.at_level(logging.WARNING):
            use(name, tmp_path)
            use(name, tmp_path)
        (said,) = caplog.messages  # once, not each time
    assert said.startswith(f"Ray {ray.__version__}: {problem}, so {LOST[name]}")
    assert said.endswith(f"Install Ray {RAY}")
    assert os.environ == before


@pytest.mark.parametrize("name", PATCHES)
def test_this_ray_has_what_is_needed(name: str) -> None:
    assert PATCHES[name].problem() is None
    assert PATCHES[name].protects is (name in PROTECTING)


@pytest.mark.parametrize(("name", "internal"), NEEDS)
def test_a_missing_internal_costs_its_guarantee(
    name: str,
    internal: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    resolve = pkgutil.resolve_name

    def resolve_others(wanted: str) -> Any:
        if wanted == internal:  # compiled classes let no attribute be deleted
            raise AttributeError(wanted)
        return resolve(wanted)

    monkeypatch.setattr(pkgutil, "resolve_name", resolve_others)
    check_that_it_is_lost(name, f"{internal} is missing", tmp_path, caplog)


@pytest.mark.parametrize(
    ("name", "internal"), [(name, i) for name, i in NEEDS if PATCHES[name].needs[i]]
)
def test_an_internal_with_other_parameters_costs_its_guarantee(
    name: str,
    internal: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    resolve = pkgutil.resolve_name
    monkeypatch.setattr(
        pkgutil,
        "resolve_name",
        lambda wanted: (lambda other: None) if wanted == internal else resolve(wanted),
    )
    taken = ", ".join(PATCHES[name].needs[internal])
    check_that_it_is_lost(name, f"{internal} does not take {taken}", tmp_path, caplog)


def test_an_attribute_that_is_really_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.delattr(services, "get_node")
    assert PATCHES["patient_start"].problem() == "ray._private.services.get_node is missing"


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("version", ["2.52.1", "2.61.0", "3.0.0.dev0"])
def test_another_version_costs_every_guarantee(
    name: str,
    version: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    problem = f"its internals are known for Ray {RAY} only"
    check_that_it_is_lost(name, problem, tmp_path, caplog)


def test_a_cluster_listens_on_the_loopback_only(cluster: None) -> None:
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening  # Ray's own processes are among the children
    assert listening <= LOOPBACK


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    answers = iter([RuntimeError("not there yet"), "node"])

    def get_node(gcs_address: str, node_id: str) -> str:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_internals, "_POLL_SECONDS", 0.0)
    with ray_internals.patient_start():
        assert services.get_node("gcs", "id") == "node"
        monkeypatch.setattr(ray_internals, "_START_SECONDS", 0.0)
        answers = iter([RuntimeError("never there")])
        with pytest.raises(RuntimeError, match="never there"):
            services.get_node("gcs", "id")
    assert services.get_node is get_node


def test_the_agent_takes_a_free_port() -> None:
    from ray._private.parameter import RayParams

    with ray_internals.free_agent_port():
        assert RayParams().dashboard_agent_listen_port == 0
        assert RayParams(dashboard_agent_listen_port=7).dashboard_agent_listen_port == 7
    assert RayParams().dashboard_agent_listen_port != 0
