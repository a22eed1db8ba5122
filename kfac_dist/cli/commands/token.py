"""`kfac-dist token`: the tokens of a server. Works directly on the store, without the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_dist.cli.environment import ready_home
from kfac_dist.cli.options import OutputOption, StoreOption
from kfac_dist.cli.output import Format, make_table, moment, say, write_result

if TYPE_CHECKING:
    from kfac_dist.service.access.tokens import Token, Tokens

token_app = typer.Typer(name="token", help="Create, list or revoke tokens for the server.")

_DAY_SECONDS = 86_400
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Owner of the jobs that the token submits.")
]


class RoleName(StrEnum):
    """The roles, as in `job_records.Role`, which --help must not import."""

    viewer = "viewer"
    submitter = "submitter"
    admin = "admin"


@token_app.command()
def create(
    name: NameArgument,
    role: Annotated[
        RoleName,
        typer.Option(
            "--role",
            help="viewer reads jobs, submitter also runs its own, admin controls all.",
        ),
    ] = RoleName.viewer,
    days: Annotated[
        float | None,
        typer.Option(
            "--days",
            metavar="N",
            help="Days for which the token is valid. Default: until it is revoked.",
        ),
    ] = None,
    store: StoreOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Create a token and print it.

    The token is shown only now: the store keeps just its hash.
    """
    from kfac_dist.service.job_records import Role

    lifetime = None if days is None else days * _DAY_SECONDS
    with _tokens(store) as tokens:
        token, secret = tokens.create(name, Role(role), lifetime_seconds=lifetime)
    write_result({"token": secret} | _facts(token), output)


@token_app.command("list")
def list_tokens(store: StoreOption = None, output: OutputOption = Format.table) -> None:
    """List all tokens, newest first, without their secrets."""
    with _tokens(store) as tokens:
        facts = [_facts(token) for token in tokens.list()]
    columns = ("name", "role", "id", "created_at", "expires_at", "revoked_at", "last_used_at")
    table = make_table(columns, [[fact[column] for column in columns] for fact in facts], right=())
    write_result({"tokens": facts}, output, table)


@token_app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The token's name or id.")],
    store: StoreOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Revoke a token at once."""
    with _tokens(store) as tokens:
        token = tokens.revoke(name)
    write_result(_facts(token), output)


@contextmanager
def _tokens(store_url: str | None) -> Iterator[Tokens]:
    from kfac_dist.cli.store import open_home_store
    from kfac_dist.service.access.tokens import Tokens

    store = open_home_store(ready_home(say), store_url)
    try:
        yield Tokens(store)
    finally:
        store.close()


def _facts(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "role": str(token.role),
        "created_at": moment(token.created_at),
        "expires_at": moment(token.expires_at),
        "revoked_at": moment(token.revoked_at),
        "last_used_at": moment(token.last_used_at),
    }
