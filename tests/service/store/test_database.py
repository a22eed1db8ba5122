"""The tables in both databases, and the errors when a database cannot be opened."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, select, text

from kfac_dist.errors import UnreachableError, UsageError
from kfac_dist.service.store import Store, TokenRow, open_store
from kfac_dist.service.store.models import Base


def token(number: int) -> TokenRow:
    return TokenRow(id=str(number), name="a", role="viewer", sha256=f"{number:064}", created_at=1.5)


def test_the_migrations_create_the_tables_of_the_models(store: Store, store_url: str) -> None:
    engine = create_engine(store_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_opening_again_keeps_the_content(store: Store, store_url: str) -> None:
    with store.write() as session:
        session.add(token(1))
    again = open_store(store_url)
    with again.read() as session:
        assert session.scalars(select(TokenRow.created_at)).all() == [1.5]
    again.close()


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.write() as session:
            session.add(token(1))
            session.flush()
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with store.read() as session:
        assert session.scalars(select(TokenRow)).all() == []


def test_many_threads_write_and_no_row_is_lost(store: Store) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 10):
            with store.write() as session:
                session.add(token(number))

    threads = [threading.Thread(target=write, args=(100 * index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as session:
        assert len(session.scalars(select(TokenRow)).all()) == 60


def test_two_openings_at_once_migrate_once(store_url: str) -> None:
    stores: list[Store] = []
    all_ready = threading.Barrier(8)

    def open_when_all_are_ready() -> None:
        all_ready.wait()
        stores.append(open_store(store_url))

    threads = [threading.Thread(target=open_when_all_are_ready) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 8
    for opened in stores:
        opened.close()


def test_opening_waits_for_another_writer_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
    open_store(f"sqlite:///{path}").close()
    assert not other.in_transaction
    other.close()


def test_tables_of_a_later_version_are_refused(store: Store, store_url: str) -> None:
    with store.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UsageError, match="from another version of kfac-dist"):
        open_store(store_url)


@pytest.mark.parametrize("url", ["", "store.db", "mysql://root@localhost/jobs", "sqlite://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="sqlite:///FILE"):
        open_store(url)


def test_an_unreachable_database_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="unable to open database file"):
        open_store(f"sqlite:///{tmp_path}/missing/store.db")
    with pytest.raises(UnreachableError) as caught:
        open_store(f"postgresql+psycopg://kfac:hidden@/jobs?host={tmp_path}")
    assert "hidden" not in caught.value.message


GARBAGE = [b"garbage, not a database at all" * 40, b"short", b"\x00" * 100]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_file_that_is_no_database_is_refused_with_advice(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(content)
    with pytest.raises(UnreachableError, match=r"not an SQLite database, or damaged .*backup"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes() == content


def add_token(store: Store, meanwhile: Callable[[], object] = str) -> None:
    with store.write() as session:
        session.add(token(2))
        meanwhile()


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_stored_in_a_file_that_was_removed(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "store.db"
    opened = open_store(f"sqlite:///{path}")
    path.rename(tmp_path / "away")
    if replaced:
        open_store(f"sqlite:///{path}").close()
    with pytest.raises(UnreachableError, match="was removed or replaced"):
        add_token(opened)
    with pytest.raises(UnreachableError, match="was removed or replaced"), opened.read():
        pass
    opened.close()


def test_a_commit_into_a_file_that_was_just_removed_is_no_success(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    opened = open_store(f"sqlite:///{path}")
    with pytest.raises(UnreachableError, match="was removed"):
        add_token(opened, meanwhile=path.unlink)
    opened.close()
