"""How commands and drivers on this machine find the server and log in to it.

`server.json` in the home folder has the server's address; `local.token` has an admin token. Only
the user who owns the home can read that token, and that user could also read the store.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_dist.errors import NotAuthenticatedError, NotFoundError
from kfac_dist.runs.writing import write_secret, write_whole
from kfac_dist.service.job_records import Role

if TYPE_CHECKING:  # commands that only read do not load the store
    from kfac_dist.service.access.tls import TlsFiles
    from kfac_dist.service.access.tokens import Tokens

_SERVER, _TOKEN = "server.json", "local.token"
LOCAL_NAME = "local"


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """The server's address as a client writes it, and the files a client needs for TLS.

    A client checks the server's certificate with `tls_ca`, and shows `client_certificate` with
    `client_key` to a server that asks for a certificate.
    """

    address: str
    pid: int
    tls_ca: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None


def local_server(address: str, tls: TlsFiles | None) -> LocalServer:
    """Return how drivers and this user's commands reach this process, given its HOST:PORT."""
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
    """Write where commands and drivers find the server."""
    write_whole(home / _SERVER, json.dumps(asdict(server)) + "\n")


def remove_server(home: Path) -> None:
    """Remove the address, so that commands report that no server runs."""
    (home / _SERVER).unlink(missing_ok=True)


def read_server(home: Path) -> LocalServer | None:
    """Return the address of this home's server, None when no server has left one.

    A server that was killed leaves its address behind: check whether its `pid` still exists.
    """
    try:
        values = json.loads((home / _SERVER).read_text())
        return LocalServer(**values)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def read_local_token(home: Path) -> str | None:
    """Return the token for this home's server, None when this user cannot read one."""
    try:
        return (home / _TOKEN).read_text().strip() or None
    except (FileNotFoundError, PermissionError):
        return None


def ensure_local_token(home: Path, tokens: Tokens) -> None:
    """Create a token for this user's commands, unless the existing one is valid in this store."""
    secret = read_local_token(home)
    if secret is not None and _is_valid(tokens, secret):
        return
    with suppress(NotFoundError):  # the first server with this store finds no token to revoke
        tokens.revoke(LOCAL_NAME)
    _, secret = tokens.create(LOCAL_NAME, Role.ADMIN)
    write_secret(home / _TOKEN, secret + "\n")


def _is_valid(tokens: Tokens, secret: str) -> bool:
    try:
        return tokens.authenticate(secret).name == LOCAL_NAME
    except NotAuthenticatedError:
        return False
