"""Each address that cannot be a cluster's has its own sentence and exit code."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kfac_dist.errors import NotAuthenticatedError, UnreachableError, UsageError
from tests.workers.cluster.jobs_api_server import JobsApi, jobs_api
from workers.cluster.jobs_api import check_answer, check_url


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsApi]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with jobs_api() as made:
        yield made


@pytest.mark.parametrize("url", ["127.0.0.1:8265", "localhost", "auto", "host:8265/"])
def test_an_address_without_a_scheme_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"needs the URL .* for example http://127.0.0.1:8265"):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["ray://host:10001", "http://", "http://host:x", "http://host:99999", "grpcs://h:1"]
)
def test_a_malformed_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="must be http://HOST:PORT"):
        check_url(url)


@pytest.mark.parametrize("url", ["http://h:8265", "https://h", "http://[::1]:8265/", "http://h/p"])
def test_a_url_is_accepted(url: str) -> None:
    check_url(url)


def test_a_cluster_with_this_version_is_accepted(api: JobsApi) -> None:
    check_answer(api.url)
    check_answer(api.url + "/")


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}: nobody answers there"):
        check_answer(f"http://127.0.0.1:{port}")


def test_something_else_answers(api: JobsApi) -> None:
    api.version = {"hello": "world"}
    with pytest.raises(UsageError, match="is not Ray's Jobs API"):
        check_answer(api.url)
    api.status = 404
    with pytest.raises(UsageError, match=r"is not Ray's Jobs API \(status 404\)"):
        check_answer(api.url)


def test_a_plain_server_is_not_reached_with_https(api: JobsApi) -> None:
    with pytest.raises(UnreachableError, match="the TLS connection fails"):
        check_answer(api.url.replace("http:", "https:"))


def test_another_version_of_ray_is_refused(api: JobsApi) -> None:
    api.version = {"ray_version": "2.9.0"}
    with pytest.raises(UsageError, match=r"runs Ray 2.9.0, drivers would come with Ray 2\."):
        check_answer(api.url)


def test_a_missing_token_is_named(api: JobsApi) -> None:
    api.status = 401
    with pytest.raises(NotAuthenticatedError, match="set RAY_AUTH_MODE=token"):
        check_answer(api.url)
