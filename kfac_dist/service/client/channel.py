"""A connection to a server: where it is, how it is secured, what is tried again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from kfac_dist.errors import UsageError
from kfac_dist.service.access.local import LocalServer
from kfac_dist.service.access.tls import is_loopback, read_pem
from kfac_dist.service.wire.transport import CLIENT_OPTIONS, Options

_SECURE = "grpcs://"
_SERVICE = "kfac_dist.v1.JobService"

# What may be asked twice. A creation has its key; resuming or retrying twice would be two requests.
_REPEATABLE = (
    "CreateJob",
    "GetJob",
    "ListJobs",
    "CancelJob",
    "PauseJob",
    "QueryMetrics",
    "ListEvents",
    "ListCheckpoints",
)
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Where a server is and how to talk to it.

    TLS is used with `grpcs://`, or when a certificate authority is given. `client_certificate` and
    `client_key` are for a server that asks for them.
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
        """Read HOST:PORT or grpcs://HOST:PORT.

        Raises:
            UsageError: it is none, or a token would travel readable beyond this machine.
        """
        target = text.removeprefix(_SECURE)
        host, colon, port = target.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536) or "/" in target:
            raise UsageError(f"server {text!r}: should be HOST:PORT, or {_SECURE}HOST:PORT for TLS")
        tls = text.startswith(_SECURE) or ca is not None
        if not tls and not is_loopback(host) and not insecure:
            raise UsageError(
                f"server {text!r}: without TLS, token and code would travel readable; write "
                f"{_SECURE}{target}, or permit it (insecure=True, KFAC_DIST_INSECURE=1) where "
                "something else protects the network"
            )
        if (client_certificate is None) != (client_key is None):
            raise UsageError("a client's certificate and its key go together")
        return cls(
            target=target,
            tls=tls,
            ca=ca,
            client_certificate=client_certificate,
            client_key=client_key,
        )

    @classmethod
    def of_local(cls, server: LocalServer) -> ServerAddress:
        """Return how to reach the server of this home; its own user decided how it is exposed."""
        return cls.parse(
            server.address,
            ca=_path(server.tls_ca),
            client_certificate=_path(server.client_certificate),
            client_key=_path(server.client_key),
            insecure=True,
        )

    def open(self) -> grpc.Channel:
        """Return a channel; it connects when it is used.

        Raises:
            NotFoundError: a certificate's file cannot be read.
        """
        config = {
            "methodConfig": [
                {
                    "name": [{"service": _SERVICE, "method": name} for name in _REPEATABLE],
                    "retryPolicy": _RETRY,
                }
            ]
        }
        options: Options = [*CLIENT_OPTIONS, ("grpc.service_config", json.dumps(config))]
        if not self.tls:
            return grpc.insecure_channel(self.target, options=options)
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
