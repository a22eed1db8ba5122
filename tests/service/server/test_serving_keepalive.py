"""Quiet connections: both ends agree on pings, and a stream resumes after a long silence."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import UnreachableError
from kfac_dist.service.client import channel
from kfac_dist.service.server import serving as server_module
from kfac_dist.service.server.serving import ServerOptions
from kfac_dist.service.wire.transport import CLIENT_OPTIONS, SERVER_OPTIONS, Options
from tests.service.requests import spec
from tests.service.serving import serving


def faster(options: Options, times: int) -> Options:
    """The options with the periods of pings divided by `times`."""
    return [
        (
            name,
            int(value) // times if "keepalive_time" in name or "ping_interval" in name else value,
        )
        for name, value in options
    ]


def test_a_quiet_stream_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CLIENT_OPTIONS", faster(CLIENT_OPTIONS, 60))
    monkeypatch.setattr(server_module, "SERVER_OPTIONS", faster(SERVER_OPTIONS, 60))
    with serving(tmp_path / "home") as server, server.client(reconnect_seconds=0) as client:
        job = client.submit(spec())
        states: list[JobState | UnreachableError] = []

        def watch() -> None:
            try:
                updates = client.watch(job.id, events=False)
                states.extend(update.job.state for update in updates if update.job is not None)
            except UnreachableError as error:
                states.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        time.sleep(8)  # sixteen pings; a server that does not expect them allows only a few
        client.cancel(job.id)
        thread.join(30)
        assert states == [JobState.PENDING, JobState.CANCELLED]


def test_a_stream_that_was_quiet_for_long_resumes_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    home = tmp_path / "home"
    with serving(home) as server:
        client = server.client(reconnect_seconds=3)
        job = client.submit(spec())
        updates = client.watch(job.id, events=False)
        assert next(updates).job is not None
        got: list[JobState] = []
        thread = threading.Thread(
            target=lambda: got.extend(update.job.state for update in updates if update.job)
        )
        thread.start()
        time.sleep(4)  # longer than `reconnect_seconds`, which must not count the silence before
        port = int(server.address.rpartition(":")[2])
    with serving(home, ServerOptions(host="127.0.0.1", port=port)) as again:
        again.jobs.cancel(job.id)
        thread.join(30)
    client.close()
    assert got == [JobState.CANCELLED]
