"""The port on which Prometheus finds the metrics of the jobs of this process."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from kfac_dist.coordination.checks import check_interval
from kfac_dist.errors import ConflictError, InvalidSpecError
from workers.driver.records.metric_series import JobSeries

# There is no login, so nobody on another machine is let in.
HOST = "127.0.0.1"


class MetricsServer:
    """What is served at `url`: the series of each job, as long as it runs."""

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        self._registry = registry
        self.url = f"http://{HOST}:{port}/metrics"

    @contextmanager
    def series(self, job: str) -> Iterator[JobSeries]:
        """Serve the series of `job` inside the block; they end with it."""
        series = JobSeries(job)
        self._registry.register(series)
        try:
            yield series
        finally:
            self._registry.unregister(series)


@contextmanager
def metrics_server(port: int | None) -> Iterator[MetricsServer | None]:
    """Serve metrics on a port of the loopback inside the block; 0 takes a free one, None none.

    Raises:
        ConflictError: the port is in use.
        InvalidSpecError: there is no such port, or it is not to be had.
    """
    if port is None:
        yield None
        return
    check_interval("metrics port", port, 0, 65535)
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise _not_to_be_had(port, error) from error
    try:
        yield MetricsServer(registry, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _not_to_be_had(port: int, error: OSError) -> ConflictError | InvalidSpecError:
    if error.errno == errno.EADDRINUSE:
        return ConflictError(
            f"metrics port: {port} on {HOST} is in use; name another, or 0 for a free one"
        )
    return InvalidSpecError(
        f"metrics port: {port} on {HOST} cannot be opened ({error.strerror}); name another, or 0 "
        "for a free one"
    )
