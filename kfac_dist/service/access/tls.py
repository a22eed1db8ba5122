"""TLS of the server, and the addresses that may do without."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import NotFoundError, UsageError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of a server. With `client_ca`, a client must show a certificate of that authority.

    `ca` is what the server's own certificate is checked with; without it, the certificate itself.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    ca: Path | None = None

    def trust(self) -> Path:
        """Return the file that a client of this machine checks the server with."""
        return (self.ca or self.certificate).absolute()


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
