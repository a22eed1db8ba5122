"""What Ray 2.60 has no setting for; the version is pinned for such reasons."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray import _raylet
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._private.parameter import RayParams

from workers.interrupts import deferred

_START_SECONDS = 60.0
_POLL_SECONDS = 0.1


@contextmanager
def on_loopback() -> Iterator[None]:
    """Keep a cluster that is started inside off the network.

    Ray replaces 127.0.0.1 by the machine's address and then listens on all interfaces, where
    anybody could run code. It does not on the systems it calls local only; its other processes,
    and drivers that they start, take that from the environment.
    """
    local_only = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    with patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False), patch.dict(environ, local_only):
        yield


def use_token(path: Path) -> None:
    """Let this process, and those it starts, show the secret in `path` to Ray, and ask for it.

    Ray has read its environment when it was imported, so it is made to read it again.
    """
    environ["RAY_AUTH_MODE"] = "token"
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    internals: Any = _raylet  # compiled, and without stubs for these
    internals.Config.initialize("")
    internals.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def patient_start() -> Iterator[None]:
    """Give a node that is started inside the time that a busy machine needs; Ray gives it 30 s."""
    get_node: Any = services.get_node

    def get_node_patiently(gcs_address: str, node_id: str) -> Any:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    with patch.object(services, "get_node", get_node_patiently):
        yield


@contextmanager
def free_agent_port() -> Iterator[None]:
    """Let a cluster's agent, which runs the drivers, take a free port instead of a fixed one.

    A second cluster on the machine would have no Jobs API.
    """
    make = RayParams.__init__

    def make_with_free_port(self: RayParams, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **({"dashboard_agent_listen_port": 0} | options))

    with patch.object(RayParams, "__init__", make_with_free_port):
        yield


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Keep Ray from writing to standard output that a worker died: the events say it, too."""

    def swallow(_data: dict[str, Any], ignore_prefix: bool) -> None:
        return None

    with patch.object(ray_worker, "print_to_stdstream", swallow):
        yield


@contextmanager
def whole_connection() -> Iterator[None]:
    """Keep an interrupt from falling into the middle of connecting to a cluster.

    Ray would forget the half of the connection that is there, and crash at the end of the process.
    """
    connect = ray_worker.connect

    def connect_whole(*arguments: Any, **options: Any) -> None:
        with deferred():
            connect(*arguments, **options)

    with patch.object(ray_worker, "connect", connect_whole):
        yield
