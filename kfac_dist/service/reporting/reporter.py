"""The driver's side of ReportService: it reports what is new in the run folder.

The server may be away for any time. The run folder keeps what it has missed, and the server's next
answer says where reporting resumes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from kfac_dist.errors import KfacDistError, UnreachableError
from kfac_dist.service.access.local import read_server
from kfac_dist.service.client.channel import ServerAddress
from kfac_dist.service.job_records import Report, ReportAnswer
from kfac_dist.service.reporting.report_messages import from_response, to_request
from kfac_dist.service.reporting.run_reader import RunReader
from kfac_dist.service.wire.status import from_rpc_error
from kfac_dist.v1.report_service_pb2_grpc import ReportServiceStub

_log = logging.getLogger(__name__)

_PERIOD_SECONDS = 0.5
_HEARTBEAT_SECONDS = 1.0  # an order from the server waits at most this long
_CALL_SECONDS = 10.0
_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.5, 5.0
_FAREWELL_SECONDS = 5.0


class ReportClient:
    """Sends reports to the server of a home folder, wherever it listens now; not thread-safe."""

    def __init__(self, home: Path, token: str) -> None:
        self._home = home
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._address = ""
        self._channel: grpc.Channel | None = None

    def send(self, report: Report) -> ReportAnswer:
        """Send a report.

        Raises:
            UnreachableError: no server runs, or it does not answer.
            KfacDistError: the server rejects the report.
        """
        stub = ReportServiceStub(self._connect())
        try:
            response = stub.Report(
                to_request(report), metadata=self._metadata, timeout=_CALL_SECONDS
            )
        except grpc.RpcError as error:
            self.close()  # the next server may listen elsewhere
            raise from_rpc_error(error, self._address) from error
        return from_response(response)

    def _connect(self) -> grpc.Channel:
        if self._channel is None:
            server = read_server(self._home)
            if server is None:
                raise UnreachableError(f"{self._home}: no server has run here")
            self._address = server.address
            self._channel = ServerAddress.from_local_server(server).open()
        return self._channel

    def close(self) -> None:
        """Close the connection; the next report opens a new one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class Reporter:
    """Reports in a thread of its own while the block runs, and what is left at its end.

    That thread calls `on_answer` with each answer.
    """

    def __init__(
        self, reader: RunReader, client: ReportClient, on_answer: Callable[[ReportAnswer], None]
    ) -> None:
        self._reader = reader
        self._client = client
        self._on_answer = on_answer
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._sent_at = 0.0
        self._backoff_seconds = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._backoff_seconds or _PERIOD_SECONDS):
            self._report_all()
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while not self._report_all() and time.monotonic() < deadline:
            time.sleep(_FIRST_BACKOFF_SECONDS)
        self._client.close()

    def _report_all(self) -> bool:
        """Report everything new, and return whether the server has received it."""
        try:
            while self._report_some():
                pass
        except UnreachableError:
            self._back_off()
            return False
        except KfacDistError as error:
            _log.warning("report: %s", error.message)
            self._back_off()
            return False
        self._backoff_seconds = 0.0
        return True

    def _report_some(self) -> bool:
        """Send one report if one is due, and return whether more may be left."""
        report = self._reader.read()
        if report.is_empty and time.monotonic() - self._sent_at < _HEARTBEAT_SECONDS:
            return False
        has_more = self._reader.has_more
        answer = self._client.send(report)
        self._sent_at = time.monotonic()
        self._reader.acknowledge(answer)
        self._on_answer(answer)
        return has_more

    def _back_off(self) -> None:
        doubled = max(_FIRST_BACKOFF_SECONDS, 2 * self._backoff_seconds)
        self._backoff_seconds = min(_LAST_BACKOFF_SECONDS, doubled)
