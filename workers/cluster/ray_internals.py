"""The internals of Ray that are replaced or called, because Ray has no setting for what they do.

Internals change without notice. So each `RayPatch` says what it needs inside Ray and which
guarantee depends on it. Before a patch is used, the version of Ray is compared with the supported
range, and what the patch needs is looked up, with the parameters it must have. Where that fails,
a patch that keeps strangers out raises; one that makes Ray more comfortable is left out, with a
warning in the log.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from os import environ
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from kfac_dist.errors import UnreachableError
from kfac_dist.supported import RAY
from workers.cluster.interrupts import deferred

_log = logging.getLogger(__name__)

_START_SECONDS = 60.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class RayPatch:
    """One patch, and what is lost without it.

    `needs` maps the dotted name of each internal to the parameters it must have; no parameters
    for what is not called. `loss` completes "..., so " in a message. A patch that `protects` keeps
    other people away from the cluster.
    """

    needs: dict[str, tuple[str, ...]]
    loss: str
    protects: bool

    def problem(self) -> str | None:
        """Return why this Ray cannot be patched; None when it can."""
        if not RAY.has(ray.__version__):
            return f"its internals are known for Ray {RAY} only"
        for name, parameters in self.needs.items():
            try:
                internal = pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                return f"{name} is missing"
            if missing := [p for p in parameters if p not in _parameters(internal)]:
                return f"{name} does not take {', '.join(missing)}"
        return None

    def is_usable(self) -> bool:
        """Return whether the patch can be used; warn once where it is left out.

        Raises:
            UnreachableError: it cannot be used, and it protects the cluster.
        """
        problem = self.problem()
        if problem is None:
            return True
        message = f"Ray {ray.__version__}: {problem}, so {self.loss}. Install Ray {RAY}"
        if self.protects:
            raise UnreachableError(message)
        _warn_once(message)
        return False


def _parameters(internal: Any) -> set[str]:
    try:
        return set(inspect.signature(internal).parameters)
    except (TypeError, ValueError):  # not a function, or compiled without a signature
        return set()


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


_LOOPBACK_DEFAULT = "ray._private.ray_constants.ENABLE_RAY_CLUSTER"
_LOOPBACK_VARIABLE = "ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR"
_CONFIG = "ray._raylet.Config.initialize"
_TOKEN_LOADER = "ray._raylet.AuthenticationTokenLoader.instance"
_TOKEN_RESET = "ray._raylet.AuthenticationTokenLoader.reset_cache"
_GET_NODE = "ray._private.services.get_node"
_RAY_PARAMS = "ray._private.parameter.RayParams.__init__"
_PRINT = "ray._private.worker.print_to_stdstream"
_CONNECT = "ray._private.worker.connect"
_NODE = "ray._private.worker._global_node"
_DEAD = "ray._private.node.Node.dead_processes"
_LIVE = "ray._private.node.Node.live_processes"
_GCS_CLIENT = "ray._raylet.GcsClient"
_DAEMONS = ("gcs_server", "raylet", "dashboard")

PATCHES = {
    "on_loopback": RayPatch(
        needs={_LOOPBACK_DEFAULT: (), _LOOPBACK_VARIABLE: ()},
        loss="the cluster would listen on all network interfaces, where anybody could run code",
        protects=True,
    ),
    "use_token": RayPatch(
        needs={_CONFIG: ("config_list",), _TOKEN_LOADER: (), _TOKEN_RESET: ()},
        loss="the cluster would not ask for a token, and every user of this machine could run code",
        protects=True,
    ),
    "patient_start": RayPatch(
        needs={_GET_NODE: ("gcs_address", "node_id")},
        loss=f"a node has 30 s to start instead of {_START_SECONDS:g} s",
        protects=False,
    ),
    "free_agent_port": RayPatch(
        needs={_RAY_PARAMS: ("dashboard_agent_listen_port",)},
        loss="a second cluster on this machine has no Jobs API",
        protects=False,
    ),
    "quiet_stdout": RayPatch(
        needs={_PRINT: ("data", "ignore_prefix")},
        loss="Ray writes the deaths of workers to standard output, between the results",
        protects=False,
    ),
    "whole_connection": RayPatch(
        needs={_CONNECT: ("node",)},
        loss="Ctrl-C while connecting to the cluster may crash the process",
        protects=False,
    ),
    "dead_daemons": RayPatch(
        needs={_NODE: (), _DEAD: ("self",)},
        loss="a cluster that has lost a daemon is not noticed and not started again",
        protects=False,
    ),
    "live_daemons": RayPatch(
        needs={_NODE: (), _LIVE: ("self",)},
        loss="a daemon of Ray that is stopped is not noticed",
        protects=False,
    ),
    "cluster_id_of": RayPatch(
        needs={_GCS_CLIENT: ()},
        loss="a job and its code could go to another cluster on the same host",
        protects=True,
    ),
}
"""The patches, by the name of the function that uses each."""


@contextmanager
def on_loopback() -> Iterator[None]:
    """Keep a cluster that is started inside the block off the network.

    Ray replaces 127.0.0.1 by the machine's address and then listens on all interfaces. It stays on
    the loopback only on the systems where it runs no clusters of several machines; it is made to
    believe that this is one. Ray's other processes, and drivers that they start, read that from
    the environment.

    Raises:
        UnreachableError: this Ray cannot be kept on the loopback.
    """
    PATCHES["on_loopback"].is_usable()
    variable = pkgutil.resolve_name(_LOOPBACK_VARIABLE)
    with mock.patch(_LOOPBACK_DEFAULT, False), mock.patch.dict(environ, {variable: "0"}):
        yield


def use_token(path: Path) -> None:
    """Make this process, and those it starts, show Ray the secret in `path` and ask for it.

    Ray read its environment when it was imported, so it is made to read it again.

    Raises:
        UnreachableError: this Ray cannot be made to.
    """
    PATCHES["use_token"].is_usable()
    environ["RAY_AUTH_MODE"] = "token"
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    pkgutil.resolve_name(_CONFIG)("")
    pkgutil.resolve_name(_TOKEN_LOADER)().reset_cache()


def patient_start() -> AbstractContextManager[Any]:
    """Give a node that is started inside the block the time that a busy machine needs."""
    return _replaced("patient_start", _GET_NODE, _retried)


def free_agent_port() -> AbstractContextManager[Any]:
    """Let the agent of a cluster, which runs the drivers, take a free port.

    With Ray's fixed port, a second cluster on the machine would have no Jobs API.
    """
    return _replaced("free_agent_port", _RAY_PARAMS, _with_free_port)


def quiet_stdout() -> AbstractContextManager[Any]:
    """Keep Ray from writing to standard output that a worker died: events already say so."""
    return _replaced("quiet_stdout", _PRINT, _without_effect)


def whole_connection() -> AbstractContextManager[Any]:
    """Defer interrupts that arrive while Ray connects to a cluster.

    Interrupted in the middle, Ray would forget the half of the connection that is already there,
    and crash at the end of the process.
    """
    return _replaced("whole_connection", _CONNECT, _uninterrupted)


def dead_daemons() -> list[str]:
    """Return which of Ray's daemons have died of the cluster that this process has started."""
    if not PATCHES["dead_daemons"].is_usable():
        return []
    node = pkgutil.resolve_name(_NODE)
    return [] if node is None else [n for n, _ in node.dead_processes() if n in _DAEMONS]


def live_daemons() -> dict[int, str]:
    """Return the daemons of the cluster that this process has started, by process id."""
    if not PATCHES["live_daemons"].is_usable():
        return {}
    node = pkgutil.resolve_name(_NODE)
    return {} if node is None else {p.pid: n for n, p in node.live_processes() if n in _DAEMONS}


def cluster_id_of(gcs_address: str) -> str:
    """Return the id of the cluster that answers at `gcs_address`, in hexadecimal digits.

    Raises:
        UnreachableError: none answers, or this Ray does not tell.
    """
    PATCHES["cluster_id_of"].is_usable()
    try:
        identity: str = pkgutil.resolve_name(_GCS_CLIENT)(address=gcs_address).cluster_id.hex()
    except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise UnreachableError(f"no Ray cluster at {gcs_address}: {error}") from error
    return identity


def _replaced(
    patch_name: str, internal: str, wrap: Callable[[Any], Any]
) -> AbstractContextManager[Any]:
    """Replace `internal` by `wrap(internal)` inside the block, where this Ray allows it."""
    if not PATCHES[patch_name].is_usable():
        return nullcontext()
    original = pkgutil.resolve_name(internal)
    # With the original's signature, so that `problem` finds the same parameters inside the block.
    return mock.patch(internal, wraps(original)(wrap(original)))


def _retried(get_node: Callable[..., Any]) -> Callable[..., Any]:
    def get_node_patiently(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return get_node(*arguments, **options)
            except RuntimeError:  # the node is not registered yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    return get_node_patiently


def _with_free_port(initialise: Callable[..., None]) -> Callable[..., None]:
    def initialise_with_free_port(*arguments: Any, **options: Any) -> None:
        initialise(*arguments, **({"dashboard_agent_listen_port": 0} | options))

    return initialise_with_free_port


def _without_effect(_print_to_stdstream: Callable[..., None]) -> Callable[..., None]:
    return lambda *_arguments, **_options: None


def _uninterrupted(connect: Callable[..., None]) -> Callable[..., None]:
    def connect_whole(*arguments: Any, **options: Any) -> None:
        with deferred():
            connect(*arguments, **options)

    return connect_whole
