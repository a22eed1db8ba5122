"""Daemons of Ray that are stopped: seen after a while, and woken where they are asked to end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.waiting import wait_until
from workers.cluster import daemons
from workers.cluster.daemons import DaemonWatch, daemons_awake, stopped_daemons


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes the place of the GCS."""
    code = "import sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(2)
        monkeypatch.setattr(daemons, "live_daemons", lambda: {process.pid: "gcs_server"})
        monkeypatch.setattr(daemons, "_LOOK_SECONDS", 0.01)
        yield process
        process.kill()


def test_a_stopped_daemon_is_lost_after_its_limit(daemon: subprocess.Popen[bytes]) -> None:
    impatient, patient = DaemonWatch(0.05), DaemonWatch(1000.0)
    assert impatient.lost() is None
    daemon.send_signal(signal.SIGSTOP)
    assert wait_until(impatient.lost, "the loss") == ("gcs_server", "was stopped")
    assert patient.lost() is None


def test_a_stopped_daemon_runs_again_while_it_is_asked_to_end(
    daemon: subprocess.Popen[bytes],
) -> None:
    daemon.send_signal(signal.SIGSTOP)
    wait_until(stopped_daemons, "the stop")
    with daemons_awake():
        wait_until(lambda: not stopped_daemons(), "waking up")
