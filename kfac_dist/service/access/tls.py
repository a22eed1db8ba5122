"""TLS of the server, and the addresses that may do without."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import NotFoundError, UsageError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of a server. With `client_ca`, a client must show a certificate of that authority.

    `ca` is what the server's own certificate is checked with; without it, the certificate itself.
    `driver_certificate` and `driver_key` are what drivers, and commands of the server's own user,
    show to it; without them, the server's own.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    ca: Path | None = None
    driver_certificate: Path | None = None
    driver_key: Path | None = None

    def trust(self) -> Path:
        """Return the file that a client of this machine checks the server with."""
        return (self.ca or self.certificate).absolute()

    def shown(self) -> tuple[Path, Path] | None:
        """Return certificate and key of the clients of this home, None where none is asked for."""
        if self.client_ca is None:
            return None
        return self.driver_certificate or self.certificate, self.driver_key or self.key

    def check_shown(self) -> None:
        """Refuse a server that would not let in the drivers of its jobs.

        Raises:
            NotFoundError: a file is not there, or may not be read.
            UsageError: their certificate is none of the clients' authority, or none for clients.
        """
        shown = self.shown()
        if self.client_ca is None or shown is None:
            return
        for path in (self.client_ca, self.certificate, self.key, *shown):
            read_pem(path)
        try:
            server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.load_cert_chain(self.certificate, self.key)
            server.load_verify_locations(self.client_ca)
            server.verify_mode = ssl.CERT_REQUIRED
            server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
            client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
            client.load_cert_chain(*shown)
            _shake_hands(server, client)
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", None) or error.reason or error
            raise UsageError(
                f"--client-ca {self.client_ca}: does not vouch for {shown[0]} as a client's "
                f"certificate ({why}), which drivers of jobs and commands of this user show; give "
                "one that it vouches for by --driver-cert and --driver-key"
            ) from error


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Read the files of a server.

    Raises:
        NotFoundError: a file is not there, or may not be read.
        UsageError: a file is not PEM.
    """
    client_ca = read_pem(files.client_ca) if files.client_ca else None
    return grpc.ssl_server_credentials(
        [(read_pem(files.key), read_pem(files.certificate))],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )


def read_pem(path: Path) -> bytes:
    """Read a PEM file.

    Raises:
        NotFoundError: it is not there, or may not be read.
        UsageError: it is not PEM.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise UsageError(f"{path}: not a PEM file (no -----BEGIN line)")
    return content


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Let the two connect in memory; raises SSLError when one refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue  # it is the other's turn
            ends.remove(end)


def check_exposure(host: str, *, has_tls: bool, insecure: bool) -> None:
    """Refuse to be reached from elsewhere without TLS.

    Raises:
        UsageError: `host` is no loopback address and there is no TLS.
    """
    if has_tls or insecure or is_loopback(host):
        return
    raise UsageError(
        f"--listen {host}: beyond this machine, tokens and code would travel readable; give "
        "--tls-cert and --tls-key, or --insecure where something else protects the network"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
