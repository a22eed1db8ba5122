"""Bearer tokens: create, list and revoke them, and find out who holds one.

A token is 256 random bits, of which the store keeps only the SHA-256: reading the store is not
enough to make a call. Salts and slow hashes protect secrets that can be guessed; these cannot.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select

from kfac_dist.errors import ConflictError, NotAuthenticatedError, NotFoundError, UsageError
from kfac_dist.service.access.caller import Caller
from kfac_dist.service.job_records import Role
from kfac_dist.service.store import Store, TokenRow

_PREFIX = "kfd_"  # lets secret scanners recognise a token
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_USED_SECONDS = 60.0  # `last_used_at` is written at most this often: each write costs a transaction


@dataclass(frozen=True, kw_only=True)
class Token:
    """Everything about a token except its secret. Times are in Unix seconds."""

    id: str
    name: str
    role: Role
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


def hash_secret(secret: str) -> str:
    """Return what the store keeps of a user's token or a driver's report token: its SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", errors="replace")).hexdigest()


class Tokens:
    """The tokens of a store. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(
        self, name: str, role: Role, *, lifetime_seconds: float | None = None
    ) -> tuple[Token, str]:
        """Create a token and return it with its secret, which is not stored anywhere.

        Jobs belong to the token's name: a new token with the name of a revoked one owns its jobs.

        Raises:
            UsageError: the name or the lifetime is wrong.
            ConflictError: a valid token already has this name.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"token name {name!r}: must have at most 100 letters, digits and . _ @ -, and "
                "begin with a letter or digit"
            )
        if lifetime_seconds is not None and lifetime_seconds <= 0:
            raise UsageError(f"lifetime {lifetime_seconds:g} s: must be above 0")
        secret = _PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        with self._store.write() as session:
            if session.scalars(select(TokenRow).where(TokenRow.name == name, _valid(now))).first():
                raise ConflictError(
                    f"token {name!r} exists; revoke it first (kfac-dist token revoke {name}), or "
                    "choose another name"
                )
            row = TokenRow(
                id=secrets.token_hex(6),
                name=name,
                role=str(role),
                sha256=hash_secret(secret),
                created_at=now,
                expires_at=None if lifetime_seconds is None else now + lifetime_seconds,
                revoked_at=None,
                last_used_at=None,
            )
            session.add(row)
            return _token(row), secret

    def list(self) -> tuple[Token, ...]:
        """Return all tokens, newest first, with those that are revoked or expired."""
        with self._store.read() as session:
            rows = session.scalars(select(TokenRow).order_by(TokenRow.created_at.desc()))
            return tuple(_token(row) for row in rows)

    def revoke(self, name_or_id: str) -> Token:
        """Revoke a token: the next call with it is refused.

        Raises:
            NotFoundError: no valid token has this name or id.
        """
        now = time.time()
        named = or_(TokenRow.name == name_or_id, TokenRow.id == name_or_id)
        with self._store.write() as session:
            row = session.scalars(
                select(TokenRow).where(named, _valid(now)).with_for_update()
            ).first()
            if row is None:
                raise NotFoundError(
                    f"no valid token {name_or_id!r}; kfac-dist token list shows all names"
                )
            row.revoked_at = now
            return _token(row)

    def authenticate(self, secret: str) -> Caller:
        """Return who holds this token.

        Raises:
            NotAuthenticatedError: the token is unknown, revoked or expired. The message does not
                say which, so that it helps nobody to guess.
        """
        now = time.time()
        with self._store.read() as session:
            row = session.scalars(
                select(TokenRow).where(TokenRow.sha256 == hash_secret(secret), _valid(now))
            ).first()
        if row is None:
            raise NotAuthenticatedError("the token is not valid: unknown, revoked or expired")
        if row.last_used_at is None or now - row.last_used_at > _USED_SECONDS:
            self._note_use(row.id, now)
        return Caller(name=row.name, role=Role(row.role))

    def _note_use(self, token_id: str, now: float) -> None:
        with self._store.write() as session:
            row = session.get(TokenRow, token_id, with_for_update=True)
            if row is not None:
                row.last_used_at = now


def _valid(now: float) -> ColumnElement[bool]:
    return TokenRow.revoked_at.is_(None) & (
        TokenRow.expires_at.is_(None) | (TokenRow.expires_at > now)
    )


def _token(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        role=Role(row.role),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
