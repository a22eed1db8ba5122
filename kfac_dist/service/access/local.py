"""The server of this machine, for commands of the same user: where it is, and a token for it.

`server.json` in the home folder says where the server listens, `local.token` is an admin's token.
Both can be read by their user alone, who could read the store as well.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_dist.errors import NotAuthenticatedError, NotFoundError
from kfac_dist.runs.writing import write_whole
from kfac_dist.service.job_records import Role

if TYPE_CHECKING:  # commands that only read do not load the store
    from kfac_dist.service.access.tls import TlsFiles
    from kfac_dist.service.access.tokens import Tokens

_SERVER, _TOKEN = "server.json", "local.token"
LOCAL_NAME = "local"


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """Where the server listens, as a client says it, and the files a client needs for TLS.

    `tls_ca` is what the server's certificate is checked with. `client_certificate` and
    `client_key` are for a server that asks for a certificate.
    """

    address: str
    pid: int
    tls_ca: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None


def local_server(address: str, tls: TlsFiles | None) -> LocalServer:
    """Return how drivers, and commands of this user, reach this process at HOST:PORT."""
    if tls is None:
        return LocalServer(address=address, pid=os.getpid())
    certificate, key = tls.shown() or (None, None)
    return LocalServer(
        address=f"grpcs://{address}",
        pid=os.getpid(),
        tls_ca=str(tls.trust()),
        client_certificate=None if certificate is None else str(certificate),
        client_key=None if key is None else str(key),
    )


def write_server(home: Path, server: LocalServer) -> None:
    """Tell commands and drivers where the server is."""
    write_whole(home / _SERVER, json.dumps(asdict(server)) + "\n")


def remove_server(home: Path) -> None:
    """Tell that there is no server any more."""
    (home / _SERVER).unlink(missing_ok=True)


def read_server(home: Path) -> LocalServer | None:
    """Return where the server of this home listens, or listened when it was killed."""
    try:
        values = json.loads((home / _SERVER).read_text())
        return LocalServer(**values)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def read_local_token(home: Path) -> str | None:
    """Return the token for the server of this home, None when there is none to be read."""
    try:
        return (home / _TOKEN).read_text().strip() or None
    except (FileNotFoundError, PermissionError):
        return None


def ensure_local_token(home: Path, tokens: Tokens) -> None:
    """Make a token for the commands of this user, unless the one there is good for this store."""
    secret = read_local_token(home)
    if secret is not None and _is_good(tokens, secret):
        return
    with suppress(NotFoundError):  # there is none at the first start with this store
        tokens.revoke(LOCAL_NAME)
    _, secret = tokens.create(LOCAL_NAME, Role.ADMIN)
    path = home / _TOKEN
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")


def _is_good(tokens: Tokens, secret: str) -> bool:
    try:
        return tokens.authenticate(secret).name == LOCAL_NAME
    except NotAuthenticatedError:
        return False
