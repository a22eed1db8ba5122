"""A connection to a server: its address, its encryption, and which calls are retried."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import UsageError
from kfac_dist.service.access.local import LocalServer
from kfac_dist.service.access.tls import check_pair, is_loopback, read_pem
from kfac_dist.service.wire.transport import CLIENT_OPTIONS, Options

_SECURE = "grpcs://"
_SERVICE = "kfac_dist.v1.JobService"

# Calls that may arrive twice without harm, so gRPC may retry them. CreateJob has its idempotency
# key. A second ResumeJob or RetryJob would be a second request.
_IDEMPOTENT = (
    "CreateJob",
    "GetJob",
    "ListJobs",
    "CancelJob",
    "PauseJob",
    "ScaleJob",
    "QueryMetrics",
    "ListEvents",
    "ListCheckpoints",
)

# Without it gRPC goes through the proxy in http_proxy, which would read the token, and which cannot
# reach this machine's loopback.
_NO_PROXY = ("grpc.enable_http_proxy", 0)
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """How to reach a server.

    `target` is HOST:PORT. With `tls`, the server's certificate is checked with `ca`, a PEM file, or
    with the system's authorities when `ca` is None. `client_certificate` and `client_key` are for
    servers that ask clients for a certificate.
    """

    target: str
    tls: bool = False
    ca: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        ca: Path | None = None,
        client_certificate: Path | None = None,
        client_key: Path | None = None,
        insecure: bool = False,
    ) -> ServerAddress:
        """Parse HOST:PORT or grpcs://HOST:PORT. The latter uses TLS, and so does giving a `ca`.

        Raises:
            UsageError: the address is malformed, or a token would leave this machine unencrypted
                without `insecure`.
        """
        target = text.removeprefix(_SECURE)
        host, colon, port = target.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536) or "/" in target:
            raise UsageError(f"server {text!r}: must be HOST:PORT, or {_SECURE}HOST:PORT for TLS")
        tls = text.startswith(_SECURE) or ca is not None
        if not tls and not is_loopback(host) and not insecure:
            raise UsageError(
                f"server {text!r}: without TLS, token and code would cross the network "
                f"unencrypted; write {_SECURE}{target}, or permit it (insecure=True, "
                "KFAC_DIST_INSECURE=1) if something else protects the network"
            )
        if (client_certificate is None) != (client_key is None):
            raise UsageError("a client's certificate needs its key, and the key its certificate")
        return cls(
            target=target,
            tls=tls,
            ca=ca,
            client_certificate=client_certificate,
            client_key=client_key,
        )

    @classmethod
    def from_local_server(cls, server: LocalServer) -> ServerAddress:
        """Return how to reach the server of this home.

        It may be used without TLS: the user who started it has decided that.
        """
        return cls.parse(
            server.address,
            ca=_path(server.tls_ca),
            client_certificate=_path(server.client_certificate),
            client_key=_path(server.client_key),
            insecure=True,
        )

    def open(self) -> grpc.Channel:
        """Return a channel, which connects on first use.

        Proxies in the environment are used only with TLS, and not for this machine.

        Raises:
            NotFoundError: a certificate's file cannot be read.
            UsageError: a file is not PEM, or the key is not that of the client's certificate.
        """
        config = {
            "methodConfig": [
                {
                    "name": [{"service": _SERVICE, "method": name} for name in _IDEMPOTENT],
                    "retryPolicy": _RETRY,
                }
            ]
        }
        options: Options = [*CLIENT_OPTIONS, ("grpc.service_config", json.dumps(config))]
        if not self.tls or is_loopback(self.target.rpartition(":")[0]):
            options.append(_NO_PROXY)
        if not self.tls:
            return grpc.insecure_channel(self.target, options=options)
        if self.client_certificate and self.client_key:
            check_pair(self.client_certificate, self.client_key, "client certificate", "client key")
        credentials = grpc.ssl_channel_credentials(
            root_certificates=read_pem(self.ca) if self.ca else None,
            private_key=read_pem(self.client_key) if self.client_key else None,
            certificate_chain=(
                read_pem(self.client_certificate) if self.client_certificate else None
            ),
        )
        return grpc.secure_channel(self.target, credentials, options=options)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
