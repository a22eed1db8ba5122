"""An embedded cluster that does not start: tried again, then reported with the load."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kfac_dist.errors import UnreachableError
from workers.cluster import cluster
from workers.cluster.cluster import Owner, local_room

LATE = Exception("The current node timed out during startup.\nThis could happen because ...")
Install = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ray_starts(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replaces `ray.init`: each start raises or returns the next of the given outcomes."""

    def install(*outcomes: BaseException | object) -> list[dict[str, Any]]:
        left, starts = list(outcomes), []

        def init(**options: Any) -> object:
            starts.append(options)
            outcome = left.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(cluster, "_ray", SimpleNamespace(init=init))
        monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
        return starts

    return install


def start(**options: Any) -> object:
    owner = Owner(mark="", run_dir=None)
    with cluster._local(local_room(), owner, **options) as context:
        return context


@pytest.mark.parametrize("error", [LATE, RuntimeError("no GCS"), OSError(11, "cannot fork")])
def test_a_start_that_fails_twice_names_the_cause_and_the_load(
    ray_starts: Install, error: Exception
) -> None:
    starts = ray_starts(error, error)
    with pytest.raises(UnreachableError) as caught:
        start()
    assert caught.value.exit_code == 5
    assert " ".join(str(error).split()) in caught.value.message
    for part in ("Ray could not be started on this machine", "a load of", "GiB of memory free"):
        assert part in caught.value.message
    assert "\n" not in caught.value.message
    folders = {options["_temp_dir"] for options in starts}
    assert len(folders) == 2
    assert not any(Path(folder).exists() for folder in folders)


def test_the_second_start_may_succeed(ray_starts: Install) -> None:
    starts = ray_starts(LATE, "context")
    assert start() == "context"
    assert len(starts) == 2


def test_a_servers_keeper_leaves_the_second_start_to_the_server(ray_starts: Install) -> None:
    starts = ray_starts(LATE)
    with pytest.raises(UnreachableError):
        start(most_starts=1)
    assert len(starts) == 1


def test_sigterm_while_ray_starts_is_an_interrupt(ray_starts: Install) -> None:
    ray_starts(SystemExit(15))  # what Ray's handler raises
    with pytest.raises(KeyboardInterrupt):
        start()


def test_the_signals_of_a_terminal_do_not_reach_rays_processes(
    ray_starts: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[set[int]] = []

    def init(**_: object) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    ray_starts()
    monkeypatch.setattr(cluster, "_ray", SimpleNamespace(init=init))
    start()
    assert masks[0] >= {signal.SIGHUP, signal.SIGQUIT}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGHUP, signal.SIGQUIT}
