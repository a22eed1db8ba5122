"""Opens the database, SQLite in WAL mode or PostgreSQL, and migrates its tables."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from kfac_dist.errors import UnreachableError, UsageError

_MIGRATIONS = Path(__file__).parent / "migrations"
_WRITES = "kfac_dist_writes"
_BUSY_SECONDS, _RETRY_SECONDS = 30, 0.01
_LOCK = 0x6B666163  # key of PostgreSQL's advisory lock for migrations: "kfac" in ASCII
_SUPPORTED = "sqlite:///FILE and postgresql+psycopg://USER@HOST/DATABASE"


class Store:
    """The database, used in transactions. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine whose tables are up to date; call `open_store` instead."""
        self._engine = engine
        self._file = _StoreFile(engine.url)
        self._writing = engine.execution_options(**{_WRITES: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that only reads, from one consistent snapshot.

        Raises:
            UnreachableError: the database does not answer, or its file was removed or replaced.
        """
        with self._session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction: after the block all its changes are durable, or none.

        Read rows that you will change with `with_for_update`, which locks them on PostgreSQL.
        SQLite ignores it: it has one writer at a time.

        Raises:
            UnreachableError: the database does not answer, or its file was removed or replaced.
        """
        with self._session(self._writing) as session:
            yield session

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        session = Session(engine, expire_on_commit=False)
        self._file.check()
        with _unreachable_errors(self._engine.url), session, session.begin():
            yield session
        self._file.check()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


class _StoreFile:
    """The file of an SQLite database, which an open connection uses even after it was removed.

    What is written to a removed file is lost with the process.
    """

    def __init__(self, url: URL) -> None:
        named = url.database if url.drivername == "sqlite" else None
        self._path = Path(named).absolute() if named and Path(named).is_file() else None
        self._opened = self._identity()

    def check(self) -> None:
        """Raise if the path does not lead to the opened file any more.

        Raises:
            UnreachableError: the file was removed or replaced.
        """
        if self._identity() != self._opened:
            raise UnreachableError(
                f"store {self._path}: its file was removed or replaced while it was in use, so "
                "nothing can be stored; end the server, restore the file or a backup, and start "
                "the server again"
            )

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return found and (found.st_dev, found.st_ino)


def open_store(url: str) -> Store:
    """Open the database at `url`, an SQLAlchemy URL, and migrate its tables.

    Raises:
        UsageError: the URL is malformed or names an unsupported database, or a later version of
            kfac-dist has migrated the tables.
        UnreachableError: the database cannot be opened, or its file is damaged.
    """
    engine = _make_engine(_parse(url))
    try:
        with _unreachable_errors(engine.url), engine.connect() as connection:
            _upgrade(connection)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UsageError(f"store: not a database URL; supported are {_SUPPORTED}") from error
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise UsageError(f"store: {parsed.drivername} is not supported; supported are {_SUPPORTED}")
    if parsed.drivername == "sqlite" and not parsed.database:
        raise UsageError("store: sqlite:// names no file; use sqlite:///FILE")
    return parsed


def _make_engine(url: URL) -> Engine:
    if url.drivername != "sqlite":
        # pre_ping replaces connections that a restart of the database server has broken.
        return create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions, not the driver
    cursor = connection.cursor()
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # a committed transaction survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to the write-ahead log, waiting while another process holds the lock.

    SQLite's own timeout covers every other lock, but not this one.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the write lock now. A transaction that reads first and writes later fails
    # when another one has written in between.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _upgrade(connection: Connection) -> None:
    """Run the missing migrations, in one process at a time."""
    connection = connection.execution_options(**{_WRITES: True})
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    with connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UsageError(
                f"store: its tables are from another version of kfac-dist ({error}); use the "
                "version that wrote it, or a later one"
            ) from error


@contextmanager
def _unreachable_errors(url: URL) -> Iterator[None]:
    """Turn connection failures into UnreachableError with the URL, but without its password."""
    try:
        yield
    except (DBAPIError, NoSuchModuleError) as error:
        if isinstance(error, DBAPIError) and not (_is_away(error) or _is_damaged(error)):
            raise
        shown = url.render_as_string(hide_password=True)
        if isinstance(error, DBAPIError) and _is_damaged(error):
            raise UnreachableError(
                f"store {shown}: not an SQLite database, or damaged ({error.orig}); restore a "
                "backup, or move the file away to begin with an empty store"
            ) from error
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise UnreachableError(f"store {shown}: {cause}") from error


def _is_damaged(error: DBAPIError) -> bool:
    """Return whether SQLite cannot read the file."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _is_away(error: DBAPIError) -> bool:
    """Return whether the database could not be reached, rather than refused a statement."""
    return type(error).__name__ in ("OperationalError", "InterfaceError")
