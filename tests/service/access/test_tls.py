"""Roles over TLS, with a certificate authority that the test makes; strangers get nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import (
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    UnreachableError,
    UsageError,
)
from kfac_dist.service.access.tls import TlsFiles, check_exposure, server_credentials
from kfac_dist.service.client import Client
from kfac_dist.service.job_records import Role
from kfac_dist.service.server.serving import ServerOptions
from tests.service.authority import Authority
from tests.service.requests import spec
from tests.service.serving import Serving, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def options(authority: Authority, *, mutual: bool = False) -> ServerOptions:
    made = authority.sign("server")
    tls = TlsFiles(
        certificate=made.certificate,
        key=made.key,
        ca=authority.ca,
        client_ca=authority.ca if mutual else None,
    )
    return ServerOptions(host="127.0.0.1", port=0, tls=tls)


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[Serving]:
    with serving(tmp_path / "home", options(authority)) as running:
        yield running


def test_roles_over_tls(server: Serving, authority: Authority) -> None:
    ca = authority.ca
    with (
        server.client("ada", ca=ca) as ada,
        server.client("eve", ca=ca) as eve,
        server.client("looker", Role.VIEWER, ca=ca) as viewer,
        server.client("root", Role.ADMIN, ca=ca) as admin,
        Client(server.address, ca=ca) as nobody,
        Client(server.address, ca=ca, token="kfd_wrong") as stranger,
    ):
        job = ada.submit(spec())
        assert viewer.get(job.id).id == job.id
        with pytest.raises(NotAllowedError, match="needs the role submitter"):
            viewer.submit(spec())
        with pytest.raises(NotAllowedError, match="submitted by 'ada'"):
            eve.cancel(job.id)
        for client in (nobody, stranger):
            with pytest.raises(NotAuthenticatedError):
                client.get(job.id)
            with pytest.raises(NotAuthenticatedError):
                next(client.logs(job.id))
        assert admin.cancel(job.id).state is JobState.CANCELLED


def test_a_client_refuses_a_server_of_another_authority(server: Serving, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other")
    with (
        server.client(ca=other.ca) as client,
        pytest.raises(UnreachableError, match="no answer from the server"),
    ):
        client.get("x")


def test_an_unencrypted_connection_to_a_tls_server_fails(server: Serving) -> None:
    with server.client() as client, pytest.raises(UnreachableError):
        client.get("x")


def test_mutual_tls_needs_a_certificate_and_a_token(tmp_path: Path, authority: Authority) -> None:
    shown = authority.sign("client")
    ca = authority.ca
    other = Authority(tmp_path / "other", "other").sign("client")
    with serving(tmp_path / "home", options(authority, mutual=True)) as server:

        def client(made: object, **changes: object) -> Client:
            files = {"client_certificate": made.certificate, "client_key": made.key}
            return server.client(ca=ca, **(files | changes))

        with client(shown) as known:
            assert list(known.jobs()) == []
        with server.client(ca=ca) as bare, pytest.raises(UnreachableError):
            list(bare.jobs())
        with client(other) as foreign, pytest.raises(UnreachableError):
            list(foreign.jobs())
        files = {"client_certificate": shown.certificate, "client_key": shown.key}
        with (
            Client(server.address, ca=ca, **files) as without_token,
            pytest.raises(NotAuthenticatedError),
        ):
            list(without_token.jobs())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "example.org", "::"])
def test_beyond_this_machine_there_must_be_tls(host: str) -> None:
    with pytest.raises(UsageError, match="--insecure"):
        check_exposure(host, has_tls=False, insecure=False)
    check_exposure(host, has_tls=True, insecure=False)
    check_exposure(host, has_tls=False, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "::1", "127.8.8.8"])
def test_this_machine_may_be_reached_without_tls(host: str) -> None:
    check_exposure(host, has_tls=False, insecure=False)


def test_a_client_does_not_send_its_token_unencrypted_beyond_this_machine() -> None:
    with pytest.raises(UsageError, match="would cross the network unencrypted"):
        Client("cluster.example.org:7341", token="secret")
    Client("cluster.example.org:7341", token="secret", insecure=True).close()
    Client("grpcs://cluster.example.org:7341", token="secret").close()


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:x", "host:70000", "http://h:1"]
)
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        Client(address)


def test_wrong_files_are_refused(tmp_path: Path, authority: Authority) -> None:
    made = authority.sign("server")
    with pytest.raises(NotFoundError, match="No such file"):
        server_credentials(TlsFiles(certificate=tmp_path / "missing.pem", key=made.key))
    text = tmp_path / "text.pem"
    text.write_text("hello")
    with pytest.raises(UsageError, match="not a PEM file"):
        server_credentials(TlsFiles(certificate=text, key=made.key))
