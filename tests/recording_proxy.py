"""A proxy on loopback that keeps what it is sent, and names itself in the environment."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


class RecordingProxy:
    """`received` holds the first bytes of each connection; each is then closed."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(5)
                self.received.append(connection.recv(4096))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@contextmanager
def recording_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    """A proxy that every variable of the environment names, with no exceptions."""
    proxy = RecordingProxy()
    for variable in _VARIABLES:
        monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv(variable.upper(), proxy.url)
    for variable in ("no_proxy", "no_grpc_proxy"):  # restored, whatever the test sets
        for name in (variable, variable.upper()):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    try:
        yield proxy
    finally:
        proxy.close()
