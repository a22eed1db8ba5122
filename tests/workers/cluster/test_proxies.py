"""Ray's Jobs API and state API on a machine whose environment names a proxy."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from kfac_dist.coordination.jobs.runner import AttemptKey
from kfac_dist.errors import UnreachableError
from tests.recording_proxy import RecordingProxy, recording_proxy
from workers.cluster.job_runner import RayJobRunner
from workers.cluster.proxies import bypass_proxies, without_proxy


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with an error, and keeps its path."""

    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(503)

    do_PUT = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    with recording_proxy(monkeypatch) as made:
        yield made


@pytest.fixture
def api() -> Iterator[tuple[str, list[str]]]:
    """The address of an HTTP server, and the paths it was asked for."""
    handler = type("Handler", (Refusing,), {"paths": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.paths
    server.shutdown()
    server.server_close()


def test_rays_apis_are_asked_directly(
    proxy: RecordingProxy, api: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    url, paths = api
    runner = RayJobRunner(url)
    with pytest.raises(UnreachableError):
        runner.status(AttemptKey("job", 1))
    asked_by_jobs = len(paths)
    assert asked_by_jobs > 0
    with pytest.raises(UnreachableError):
        runner.resources()
    assert len(paths) > asked_by_jobs
    assert proxy.received == []


def test_exceptions_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", ".corp, 10.0.0.1")
    bypass_proxies("http://head.cluster:8265")
    bypass_proxies("http://head.cluster:8265")
    expected = ".corp,10.0.0.1,127.0.0.1,localhost,::1,head.cluster"
    assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (expected, expected)


def test_grpcs_own_exceptions_are_extended_only_where_they_are_set(
    proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback = "127.0.0.1,localhost,::1"
    assert without_proxy() == {"no_proxy": loopback, "NO_PROXY": loopback}
    monkeypatch.setenv("no_grpc_proxy", "a.corp")
    assert without_proxy()["no_grpc_proxy"] == f"a.corp,{loopback}"


@pytest.mark.parametrize(
    ("url", "is_direct"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://[::1]:8265", True),
        ("http://head.cluster:8265", True),
        ("https://head.cluster", False),
    ],
)
def test_only_tls_to_another_machine_may_use_the_proxy(
    proxy: RecordingProxy, url: str, is_direct: bool
) -> None:
    bypass_proxies(url)
    assert (requests.utils.get_environ_proxies(url) == {}) is is_direct
