"""Opening the database: SQLite in WAL mode, or PostgreSQL; its tables are brought up to date."""

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
_LOCK = 0x6B666163  # of the advisory lock, "kfac"
_SUPPORTED = "sqlite:///FILE and postgresql+psycopg://USER@HOST/DATABASE"


class Store:
    """The database, as transactions."""

    def __init__(self, engine: Engine) -> None:
        """Use `open_store` instead."""
        self._engine = engine
        self._writing = engine.execution_options(**{_WRITES: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Give one consistent view; on SQLite, writers do not wait for it.

        Raises:
            UnreachableError: the database does not answer.
        """
        with self._session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Give a transaction: all of it is durable at the end of the block, or nothing is.

        Lock the rows that are read before they are changed with `with_for_update`, which SQLite
        does not need: there, one writes at a time.

        Raises:
            UnreachableError: the database does not answer.
        """
        with self._session(self._writing) as session:
            yield session

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        session = Session(engine, expire_on_commit=False)
        with _told(self._engine.url), session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def open_store(url: str) -> Store:
    """Open the database at `url`, an SQLAlchemy URL, and bring its tables up to date.

    Raises:
        UsageError: the URL is none, or of another kind of database; or the tables are of a later
            version of this program.
        UnreachableError: the database cannot be opened.
    """
    engine = _make_engine(_parse(url))
    try:
        with _told(engine.url), engine.connect() as connection:
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
        # A server that was started again is noticed before a request fails.
        return create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    cursor = connection.cursor()
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # what was promised survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to the write-ahead log; a lock that another opening holds is waited for.

    SQLite itself waits for every lock but this one.
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
    """Begin as a writer at once: a reader that turns into one may find that it is too late."""
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _upgrade(connection: Connection) -> None:
    """Run the migrations that are missing, one process at a time."""
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
                f"store: its tables are of another version of kfac-dist ({error}); use the "
                "version that wrote it, or a later one"
            ) from error


@contextmanager
def _told(url: URL) -> Iterator[None]:
    """Tell of a database that does not answer, without its password."""
    try:
        yield
    except (DBAPIError, NoSuchModuleError) as error:
        if isinstance(error, DBAPIError) and not _is_away(error):
            raise
        shown = url.render_as_string(hide_password=True)
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise UnreachableError(f"store {shown}: {cause}") from error


def _is_away(error: DBAPIError) -> bool:
    """Whether the database, and not the question, is the problem."""
    return type(error).__name__ in ("OperationalError", "InterfaceError")
