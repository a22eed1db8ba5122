"""Stores in both databases; the tests start their own PostgreSQL server, on a socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, text

from kfac_dist.service.store import Store, open_store


def _binaries() -> Path:
    found = shutil.which("postgres")
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *([Path(found).parent] if found else [])]
    for folder in sorted(folders, reverse=True):
        if all((folder / name).exists() for name in ("postgres", "initdb", "pg_ctl")):
            return folder
    pytest.skip("needs a PostgreSQL server: apt-get install postgresql")


def _user() -> str | None:
    """The user that runs PostgreSQL, which refuses to run as root; None for this user."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in names:
            return name
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL, with a gap for the database's name, of a server that listens only on a socket."""
    binaries, user = _binaries(), _user()
    # The path of a Unix socket is at most 107 bytes long, so the folder must be near the root.
    folder = Path(tempfile.mkdtemp(prefix="kfac-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    try:
        run(str(binaries / "initdb"), "-D", data, "-U", "kfac", "-A", "trust", "-E", "UTF8")
        log = str(folder / "log")
        run(str(binaries / "pg_ctl"), "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://kfac@/{{}}?host={folder}"
        finally:
            run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
        return
    server = request.getfixturevalue("postgresql")
    name = f"test_{uuid4().hex}"
    admin = create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    yield server.format(name)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty store, in each database."""
    opened = open_store(store_url)
    yield opened
    opened.close()
