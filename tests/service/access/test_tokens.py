"""Tokens, in both databases."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from kfac_dist.errors import ConflictError, NotAuthenticatedError, NotFoundError, UsageError
from kfac_dist.service.access.local import ensure_local_token, read_local_token
from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.job_records import Role
from kfac_dist.service.store import Store, TokenRow


@pytest.fixture
def tokens(store: Store) -> Tokens:
    return Tokens(store)


def test_a_token_identifies_its_holder(tokens: Tokens) -> None:
    token, secret = tokens.create("ada", Role.SUBMITTER)
    caller = tokens.authenticate(secret)
    assert (caller.name, caller.role) == ("ada", Role.SUBMITTER)
    (listed,) = tokens.list()
    assert listed.id == token.id
    assert listed.last_used_at is not None


def test_the_store_does_not_keep_the_secret(store: Store, tokens: Tokens) -> None:
    _, secret = tokens.create("ada", Role.VIEWER)
    with store.read() as session:
        row = session.scalars(select(TokenRow)).one()
    assert secret not in str(vars(row).values())
    assert secret not in str(tokens.list())


@pytest.mark.parametrize("secret", ["", "kfd_", "wrong", "x" * 10_000, "\ud800"])
def test_a_made_up_token_is_refused(tokens: Tokens, secret: str) -> None:
    tokens.create("ada", Role.ADMIN)
    with pytest.raises(NotAuthenticatedError):
        tokens.authenticate(secret)


def test_a_revoked_token_is_refused_and_its_name_is_free(tokens: Tokens) -> None:
    _, secret = tokens.create("ada", Role.ADMIN)
    with pytest.raises(ConflictError, match="revoke it first"):
        tokens.create("ada", Role.VIEWER)
    tokens.revoke("ada")
    with pytest.raises(NotAuthenticatedError):
        tokens.authenticate(secret)
    with pytest.raises(NotFoundError):
        tokens.revoke("ada")
    _, other = tokens.create("ada", Role.VIEWER)
    assert tokens.authenticate(other).role is Role.VIEWER


def test_an_expired_token_is_refused_and_its_name_is_free(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = tokens.create("ada", Role.VIEWER, lifetime_seconds=60)
    assert tokens.authenticate(secret).name == "ada"
    from kfac_dist.service.access import tokens as module

    later = module.time.time() + 61
    monkeypatch.setattr(module.time, "time", lambda: later)
    with pytest.raises(NotAuthenticatedError):
        tokens.authenticate(secret)
    tokens.create("ada", Role.VIEWER)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 101, "ä"])
def test_odd_names_are_refused(tokens: Tokens, name: str) -> None:
    with pytest.raises(UsageError, match="token name"):
        tokens.create(name, Role.VIEWER)


def test_the_local_token_is_for_its_user_alone_and_kept(tokens: Tokens, tmp_path: Path) -> None:
    ensure_local_token(tmp_path, tokens)
    secret = read_local_token(tmp_path)
    assert secret is not None
    assert stat.S_IMODE((tmp_path / "local.token").stat().st_mode) == 0o600
    assert tokens.authenticate(secret).role is Role.ADMIN
    ensure_local_token(tmp_path, tokens)
    assert read_local_token(tmp_path) == secret
    tokens.revoke("local")
    ensure_local_token(tmp_path, tokens)
    again = read_local_token(tmp_path)
    assert again not in (None, secret)
    assert [token.revoked_at is None for token in tokens.list()] == [True, False]
