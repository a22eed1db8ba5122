"""A server that does not answer: each cause has its own sentence."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.errors import UnreachableError, UsageError
from kfac_dist.service.access.tls import TlsFiles
from kfac_dist.service.client import Client
from kfac_dist.service.client.channel import ServerAddress
from kfac_dist.service.client.diagnosis import why_silent
from kfac_dist.service.server.serving import ServerOptions
from tests.service.authority import Authority, Certificate
from tests.service.serving import Serving, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def options(made: Certificate, client_ca: Path | None = None) -> ServerOptions:
    tls = TlsFiles(certificate=made.certificate, key=made.key, client_ca=client_ca)
    return ServerOptions(host="127.0.0.1", port=0, tls=tls)


@pytest.fixture
def secure(tmp_path: Path, authority: Authority) -> Iterator[Serving]:
    with serving(tmp_path / "home", options(authority.sign("server"))) as running:
        yield running


def why(client: Client) -> str:
    with client, pytest.raises(UnreachableError) as caught:
        client.get("x")
    start, _, sentence = caught.value.message.partition(": no answer from the server: ")
    assert start == client.address
    return sentence


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert why(Client(f"127.0.0.1:{port}")).startswith("nobody listens there")


def test_a_host_that_is_not_known() -> None:
    server = ServerAddress(target="no-such-host.invalid:7341")
    assert why_silent(server) == "the host name no-such-host.invalid is not known"


def test_a_server_with_tls_that_is_called_without(secure: Serving) -> None:
    assert why(Client(secure.address)) == (
        f"the server uses TLS; write grpcs://{secure.address}, with --ca if needed"
    )


def test_a_server_without_tls_that_is_called_with(tmp_path: Path, authority: Authority) -> None:
    with serving(tmp_path / "plain") as plain:
        sentence = why(Client(plain.address, ca=authority.ca))
    assert sentence == (
        f"the server does not use TLS; write {plain.address} without grpcs:// and --ca"
    )


def test_an_authority_that_did_not_sign(secure: Serving, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other")
    sentence = why(Client(secure.address, ca=other.ca))
    assert sentence.startswith("the server's certificate is not accepted: ")
    assert f"signed by the authority in {other.ca}" in sentence


def test_a_certificate_that_has_expired(tmp_path: Path, authority: Authority) -> None:
    old = authority.sign("old", valid_hours=(-9, -1))
    with serving(tmp_path / "old", options(old)) as running:
        sentence = why(Client(running.address, ca=authority.ca))
    assert sentence == "a certificate in the server's chain, or the authority's, has expired"


def test_a_certificate_for_another_host(secure: Serving, authority: Authority) -> None:
    address = secure.address.replace("127.0.0.1", "localhost")
    assert why(Client(address, ca=authority.ca)) == (
        "the server's certificate is not for localhost; use a name or address that it has"
    )


def test_a_missing_and_a_foreign_certificate_of_a_client(
    tmp_path: Path, authority: Authority
) -> None:
    made = authority.sign("server")
    foreign = Authority(tmp_path / "other", "other").sign("client")
    with serving(tmp_path / "home", options(made, authority.ca)) as running:
        bare = why(Client(running.address, ca=authority.ca))
        shown = {"client_certificate": foreign.certificate, "client_key": foreign.key}
        refused = why(Client(running.address, ca=authority.ca, **shown))
    assert bare.endswith("set KFAC_DIST_CLIENT_CERT and KFAC_DIST_CLIENT_KEY")
    assert f"may refuse the client's certificate {foreign.certificate}: " in refused


def test_a_key_of_another_certificate_is_refused_at_once(authority: Authority) -> None:
    one, other = authority.sign("one"), authority.sign("two")
    files = {"client_certificate": one.certificate, "client_key": other.key}
    with pytest.raises(UsageError, match=r"client key .*two.key: is not the key of client cert"):
        Client("grpcs://127.0.0.1:1", ca=authority.ca, **files)


def test_a_server_that_answers_is_not_blamed(secure: Serving, authority: Authority) -> None:
    assert why_silent(ServerAddress(target=secure.address, tls=True, ca=authority.ca)) is None
