"""Which server a command speaks to, and as whom: by options, the environment, or this machine.

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
    quiet_grpc()
    if named is None:
        return _local(ca)

    from kfac_dist.service.client import Client  # takes gRPC along

    return Client(
        named,
        token=os.environ.get("KFAC_DIST_TOKEN"),
        ca=ca or _path("KFAC_DIST_CA"),
        client_certificate=_path("KFAC_DIST_CLIENT_CERT"),
        client_key=_path("KFAC_DIST_CLIENT_KEY"),
        insecure=os.environ.get("KFAC_DIST_INSECURE") == "1",
    )


def quiet_grpc() -> None:
    """Keep gRPC's own words off stderr, unless the user asked for them; before it is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _local(ca: Path | None) -> Client:
    """Return a client of the server of this machine and user."""
    from kfac_dist.service.access.local import read_local_token, read_server

    found = read_server(home())
    if found is None or not Path(f"/proc/{found.pid}").exists():
        raise UnreachableError(
            f"no server runs with {home()}; start one with kfac-dist serve, or name one by "
            "--server or $KFAC_DIST_SERVER"
        )

    from kfac_dist.service.client import Client

    return Client(
        found.address,
        token=os.environ.get("KFAC_DIST_TOKEN") or read_local_token(home()),
        ca=ca or _file(found.tls_ca),
        client_certificate=_file(found.client_certificate),
        client_key=_file(found.client_key),
        insecure=True,  # whoever started it decided
    )


def _file(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return absolute(Path(value)) if value else None
