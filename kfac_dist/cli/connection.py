"""The connection of a command to its server: the one named, else the one on this machine.

    $KFAC_DIST_SERVER        address, where --server is missing
    $KFAC_DIST_TOKEN         the user's token
    $KFAC_DIST_CA            authority that signed the server's certificate, where --ca is missing
    $KFAC_DIST_CLIENT_CERT   certificate for servers that ask clients for one
    $KFAC_DIST_CLIENT_KEY    its key
    $KFAC_DIST_INSECURE      1 permits sending the token beyond this machine without TLS

The token has no option, because other users of the machine can read command lines.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_dist.cli.environment import absolute, home
from kfac_dist.cli.output import say
from kfac_dist.errors import UnreachableError

if TYPE_CHECKING:
    from kfac_dist.service.client import Client


def connect(server: str | None, ca: Path | None) -> Client:
    """Return a client of the server that the options or the environment name, else the local one.

    Its streams wait for as long as it takes when a server that has answered is away, and say so.

    Raises:
        UnreachableError: no server is named, and none runs on this machine.
        UsageError: the address is malformed.
    """
    named = server or os.environ.get("KFAC_DIST_SERVER")
    quiet_grpc()
    if named is None:
        return _connect_locally(ca)

    from kfac_dist.service.client import Client  # imports gRPC

    return Client(
        named,
        token=os.environ.get("KFAC_DIST_TOKEN"),
        ca=ca or _path_in("KFAC_DIST_CA"),
        client_certificate=_path_in("KFAC_DIST_CLIENT_CERT"),
        client_key=_path_in("KFAC_DIST_CLIENT_KEY"),
        insecure=os.environ.get("KFAC_DIST_INSECURE") == "1",
        reconnect_seconds=math.inf,
        on_waiting=_say_waiting,
    )


def quiet_grpc() -> None:
    """Keep gRPC's own messages off stderr, unless the user wants them.

    Has an effect only before gRPC is imported.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _connect_locally(ca: Path | None) -> Client:
    """Return a client of this user's server on this machine."""
    from kfac_dist.service.access.local import read_local_token, read_server

    found = read_server(home())
    if found is None or not Path(f"/proc/{found.pid}").exists():
        raise UnreachableError(
            f"no server runs with the home {home()}; start one with kfac-dist serve, or name one "
            "with --server or $KFAC_DIST_SERVER"
        )

    from kfac_dist.service.client import Client

    return Client(
        found.address,
        token=os.environ.get("KFAC_DIST_TOKEN") or read_local_token(home()),
        ca=ca or _file(found.tls_ca),
        client_certificate=_file(found.client_certificate),
        client_key=_file(found.client_key),
        insecure=True,  # the user who started the server has decided that
        reconnect_seconds=math.inf,
        on_waiting=_say_waiting,
    )


def _say_waiting(message: str) -> None:
    say(f"{message}; waiting for the server, Ctrl-C ends this")


def _file(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _path_in(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return absolute(Path(value)) if value else None
