"""The server's TLS, and which addresses may be used without it."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import NotFoundError, UsageError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The PEM files of a server.

    Args:
        certificate: the server's certificate chain.
        key: the private key of `certificate`.
        client_ca: authority of clients; each client must then show a certificate it signed.
        ca: authority of the server; clients on this machine check `certificate` with it, or with
            `certificate` itself when it is None.
        driver_certificate: certificate that drivers and the server user's own commands show when
            there is a `client_ca`; None uses `certificate`.
        driver_key: the private key of `driver_certificate`.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    ca: Path | None = None
    driver_certificate: Path | None = None
    driver_key: Path | None = None

    def trust(self) -> Path:
        """Return the file with which a client on this machine checks the server's certificate."""
        return (self.ca or self.certificate).absolute()

    def shown(self) -> tuple[Path, Path] | None:
        """Return the certificate and key of this home's clients, None if they need none."""
        if self.client_ca is None:
            return None
        return self.driver_certificate or self.certificate, self.driver_key or self.key

    def check_shown(self) -> None:
        """Refuse files with which the server would turn away the drivers of its own jobs.

        Raises:
            NotFoundError: a file does not exist or cannot be read.
            UsageError: `client_ca` did not sign the drivers' certificate, or did not sign it for
                clients.
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
                f"--client-ca {self.client_ca}: does not accept {shown[0]} as a client's "
                f"certificate ({why}). Drivers of jobs and commands of this user show that "
                "certificate; give them one that the authority has signed for clients with "
                "--driver-cert and --driver-key"
            ) from error


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Read the files of a server.

    Raises:
        NotFoundError: a file does not exist or cannot be read.
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
        NotFoundError: the file does not exist or cannot be read.
        UsageError: the file is not PEM.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise UsageError(f"{path}: not a PEM file (no -----BEGIN line)")
    return content


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Connect the two ends in memory.

    Raises:
        SSLError: one end refuses the other.
    """
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
                continue  # this end waits for bytes of the other end
            ends.remove(end)


def check_exposure(host: str, *, has_tls: bool, insecure: bool) -> None:
    """Refuse to listen beyond this machine without TLS.

    Raises:
        UsageError: `host` is not a loopback address, and neither TLS nor `insecure` is set.
    """
    if has_tls or insecure or is_loopback(host):
        return
    raise UsageError(
        f"--listen {host}: without TLS, tokens and code would cross the network unencrypted; give "
        "--tls-cert and --tls-key, or --insecure if something else protects the network"
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
