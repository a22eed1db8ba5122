"""A call ends at the client's or the server's deadline, and the server continues to serve."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from kfac_dist.errors import TimedOutError
from kfac_dist.service.access.limits import ServerLimits
from kfac_dist.service.server.serving import ServerOptions
from tests.service.requests import spec
from tests.service.serving import Serving, serving


class Jam:
    """Holds the store's write lock, so that every other writer waits."""

    def __init__(self, server: Serving) -> None:
        self._server = server
        self._release = threading.Event()
        self._held = threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._server.jobs.store.write() as session:
            session.execute(text("SELECT 1"))  # the transaction begins with its first statement
            self._held.set()
            self._release.wait(60)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._held.wait(30)

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._thread.join()


def test_the_servers_own_deadline(tmp_path: Path) -> None:
    options = ServerOptions(host="127.0.0.1", port=0, limits=ServerLimits(call_seconds=0.5))
    with serving(tmp_path / "home", options) as server, server.client() as client:
        job = client.submit(spec())
        with Jam(server), pytest.raises(TimedOutError, match="PauseJob took too long"):
            client.pause(job.id)
        assert client.get(job.id).id == job.id


def test_the_clients_deadline(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, server.client() as patient:
        job = patient.submit(spec())
        with (
            server.client(timeout_seconds=0.5) as client,
            Jam(server),
            pytest.raises(TimedOutError),
        ):
            client.pause(job.id)
        assert patient.get(job.id).id == job.id
