"""The port where Prometheus finds the metrics of this process's jobs."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import ConflictError, InvalidSpecError
from workers.driver.records.metric_series import JobSeries

# The page asks for no login, so only this machine may reach it.
HOST = "127.0.0.1"


class MetricsServer:
    """Serves, at `url`, the series of each job while it runs."""

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        self._registry = registry
        self.url = f"http://{HOST}:{port}/metrics"

    @contextmanager
    def series(self, job: str) -> Iterator[JobSeries]:
        """Serve the series of `job` inside the block, and remove them at its end."""
        series = JobSeries(job)
        self._registry.register(series)
        try:
            yield series
        finally:
            self._registry.unregister(series)


@contextmanager
def metrics_server(port: int | None) -> Iterator[MetricsServer | None]:
    """Serve metrics on a loopback port inside the block.

    `port` 0 takes any free port; None serves nothing, and the block gets None.

    Raises:
        ConflictError: the port is in use.
        InvalidSpecError: the port is out of range, or cannot be opened.
    """
    if port is None:
        yield None
        return
    check_interval("metrics port", port, 0, 65535)
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise _cannot_open(port, error) from error
    try:
        yield MetricsServer(registry, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _cannot_open(port: int, error: OSError) -> ConflictError | InvalidSpecError:
    if error.errno == errno.EADDRINUSE:
        return ConflictError(
            f"metrics port: {port} on {HOST} is in use; name another, or 0 for a free one"
        )
    return InvalidSpecError(
        f"metrics port: {port} on {HOST} cannot be opened ({error.strerror}); name another, or 0 "
        "for a free one"
    )
