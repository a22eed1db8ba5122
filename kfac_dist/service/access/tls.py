"""The server's TLS, and which addresses may be used without it."""

from __future__ import annotations

import ipaddress
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import NotFoundError, UsageError

_SOON_SECONDS = 14 * 24 * 3600.0
# By OpenSSL's number of the error.
_WRONG_TIMES = {
    9: "is not valid yet; look at the clock of this machine",
    10: "has expired; renew it",
}


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

    def check(self) -> list[str]:
        """Refuse files with which no client could connect; return what will soon be wrong.

        Raises:
            NotFoundError: a file does not exist or cannot be read.
            UsageError: the key is another certificate's, the certificate has expired or is not
                valid yet, or `ca` did not sign it for servers.
        """
        check_pair(self.certificate, self.key, "--tls-cert", "--tls-key")
        ends_at = _end_of_validity(self.certificate, self.key, self.ca)
        soon = ends_at - time.time() < _SOON_SECONDS
        day = _day(ends_at)
        return [f"--tls-cert {self.certificate}: expires on {day}; renew it"] if soon else []

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
        if self.driver_certificate and self.driver_key:
            check_pair(self.driver_certificate, self.driver_key, "--driver-cert", "--driver-key")
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


def check_pair(certificate: Path, key: Path, certificate_name: str, key_name: str) -> None:
    """Refuse a key that does not belong to its certificate.

    The names are those of the options or variables that gave the files.

    Raises:
        NotFoundError: a file does not exist or cannot be read.
        UsageError: it is not PEM, cannot be used, or belongs to another certificate.
    """
    for path in (certificate, key):
        read_pem(path)
    _load_pair(
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, certificate_name, key_name
    )


def _load_pair(
    context: ssl.SSLContext, certificate: Path, key: Path, certificate_name: str, key_name: str
) -> None:
    try:
        # Without an answer to hand, OpenSSL would ask for the key's password at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"{key_name} {key}: is not the key of {certificate_name} {certificate}"
            ) from error
        if b"ENCRYPTED" in read_pem(key):
            raise UsageError(
                f"{key_name} {key}: is encrypted with a password; give the key without one"
            ) from error
        raise UsageError(
            f"{certificate_name} {certificate} and {key_name} {key}: cannot be used "
            f"({error.reason or error})"
        ) from error


def _end_of_validity(certificate: Path, key: Path, ca: Path | None) -> float:
    """Return when a server's certificate expires, as Unix time.

    Raises:
        UsageError: a client that trusts `ca`, or else the certificate itself, would refuse it now.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # which names clients use is not known here
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    _load_pair(server, certificate, key, "--tls-cert", "--tls-key")
    read_pem(ca or certificate)
    try:
        client.load_verify_locations(ca or certificate)
        _, accepted = _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_TIMES:
            why = _WRONG_TIMES[error.verify_code]
        elif ca is not None:
            why = f"clients that trust --tls-ca {ca} would refuse it ({error.verify_message})"
        else:
            why = f"clients would refuse it ({error.verify_message})"
        raise UsageError(f"--tls-cert {certificate}: {why}") from error
    except ssl.SSLError as error:
        raise UsageError(f"--tls-ca {ca}: cannot be used ({error.reason or error})") from error
    shown = accepted.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Connect the two ends in memory, and return the server's and the client's view of it.

    Raises:
        SSLError: one end refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    accepting = client.wrap_bio(to_client, to_server)
    serving = server.wrap_bio(to_server, to_client, server_side=True)
    ends = [accepting, serving]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue  # this end waits for bytes of the other end
            ends.remove(end)
    return serving, accepting


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
