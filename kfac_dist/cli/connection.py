"""Which server a command speaks to, and as whom: options, then the environment, then this machine's.

`$KFAC_DIST_SERVER` and `$KFAC_DIST_TOKEN` name a server and a token, `$KFAC_DIST_CA` the authority
that vouches for the server, `$KFAC_DIST_CLIENT_CERT` and `$KFAC_DIST_CLIENT_KEY` a certificate of
one's own. A token is no option: a command line can be read by others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.environment import absolute, home
from kfac_dist.errors import UnreachableError

if TYPE_CHECKING:
    from kfac_dist.service.client import Client

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDRESS",
        help="HOST:PORT, or grpcs://HOST:PORT for TLS; else $KFAC_DIST_SERVER, else the server of "
        "this machine.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        help="PEM file of who vouches for the server; else $KFAC_DIST_CA, else the system's.",
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as list shows it.")]


def connect(server: str | None, ca: Path | None) -> Client:
    """Return a client of the server that is meant.

    Raises:
        UnreachableError: none is named, and none runs on this machine.
        UsageError: the address is none.
    """
    named = server or os.environ.get("KFAC_DIST_SERVER")
    token = os.environ.get("KFAC_DIST_TOKEN")
    given_ca = ca or _path("KFAC_DIST_CA")
    if named is None:
        named, local_token, local_ca = _local()
        token, given_ca = token or local_token, given_ca or local_ca

    from kfac_dist.service.client import Client  # takes gRPC along

    return Client(
        named,
        token=token,
        ca=given_ca,
        client_certificate=_path("KFAC_DIST_CLIENT_CERT"),
        client_key=_path("KFAC_DIST_CLIENT_KEY"),
        insecure=os.environ.get("KFAC_DIST_INSECURE") == "1",
    )


def _local() -> tuple[str, str | None, Path | None]:
    """Address, token and authority of the server of this machine and user."""
    from kfac_dist.service.access.local import read_local_token, read_server

    found = read_server(home())
    if found is None or not Path(f"/proc/{found.pid}").exists():
        raise UnreachableError(
            f"no server runs with {home()}; start one with kfac-dist serve, or name one by "
            "--server or $KFAC_DIST_SERVER"
        )
    ca = None if found.tls_ca is None else Path(found.tls_ca)
    return found.address, read_local_token(home()), ca


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return absolute(Path(value)) if value else None
