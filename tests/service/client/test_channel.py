"""Connections and the proxies that the environment names."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kfac_dist.errors import NotAuthenticatedError
from kfac_dist.service.access.local import LocalServer, write_server
from kfac_dist.service.access.tls import TlsFiles
from kfac_dist.service.client.channel import ServerAddress
from kfac_dist.service.job_records import Report
from kfac_dist.service.reporting.reporter import ReportClient
from kfac_dist.service.server.serving import ServerOptions
from tests.recording_proxy import RecordingProxy, recording_proxy
from tests.service.authority import Authority
from tests.service.requests import spec
from tests.service.serving import serving


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    with recording_proxy(monkeypatch) as made:
        yield made


def test_no_byte_of_a_loopback_server_reaches_a_proxy(
    tmp_path: Path, proxy: RecordingProxy
) -> None:
    with serving(tmp_path / "home") as server, server.client() as client:
        job = client.submit(spec())
        assert [listed.id for listed in client.jobs()] == [job.id]
        client.cancel(job.id)
        assert client.wait(job.id, timeout_seconds=20).id == job.id
        assert list(client.logs(job.id)) == []
    assert proxy.received == []


def test_no_byte_of_a_driver_reaches_a_proxy(tmp_path: Path, proxy: RecordingProxy) -> None:
    with serving(tmp_path / "home") as server:
        write_server(tmp_path, LocalServer(address=server.address, pid=os.getpid()))
        driver = ReportClient(tmp_path, "secret")
        with pytest.raises(
            NotAuthenticatedError, match="not the report token"
        ):  # the server has answered
            driver.send(Report(job="none", attempt=1))
        driver.close()
    assert proxy.received == []


def test_a_loopback_server_with_tls_is_reached_without_a_proxy(
    tmp_path: Path, proxy: RecordingProxy
) -> None:
    authority = Authority(tmp_path)
    made = authority.sign("server")
    tls = TlsFiles(certificate=made.certificate, key=made.key, ca=authority.ca)
    options = ServerOptions(host="127.0.0.1", port=0, tls=tls)
    with serving(tmp_path / "home", options) as server, server.client(ca=authority.ca) as client:
        assert list(client.jobs()) == []
    assert proxy.received == []


def test_a_plain_connection_to_another_machine_uses_no_proxy(proxy: RecordingProxy) -> None:
    # A name that leads back to this machine, though not by loopback's own names.
    address = ServerAddress.parse(f"{socket.gethostname()}:9", insecure=True)
    assert_unreachable(address)
    assert proxy.received == []


def test_tls_to_another_machine_may_use_the_proxy(proxy: RecordingProxy) -> None:
    assert_unreachable(ServerAddress.parse("grpcs://server.invalid:443"))
    assert proxy.received
    assert proxy.received[0].startswith(b"CONNECT server.invalid:443 ")


def assert_unreachable(address: ServerAddress) -> None:
    with address.open() as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1)
