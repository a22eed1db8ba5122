"""The server's life: listen, announce the address, answer until asked to end, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kfac_dist.errors import UsageError
from kfac_dist.service.access.limits import ServerLimits
from kfac_dist.service.access.tls import TlsFiles, check_exposure, server_credentials
from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server import job_calls, report_calls
from kfac_dist.service.server.calls import Gate, TokenForReflection
from kfac_dist.service.server.log_stream import LogStreams
from kfac_dist.service.server.wakeups import JobWakeups
from kfac_dist.service.server.watch_stream import WatchStreams
from kfac_dist.service.wire.transport import SERVER_OPTIONS

_log = logging.getLogger(__name__)

_THREADS = 16  # for calls into `Jobs`, which block on the database
SERVICES = (job_calls.SERVICE, report_calls.SERVICE)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how a server listens; port 0 picks a free port."""

    host: str
    port: int
    tls: TlsFiles | None = None
    insecure: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)
    drain_seconds: float = 10.0


async def serve(
    jobs: Jobs, tokens: Tokens, options: ServerOptions, on_ready: Callable[[str], None]
) -> None:
    """Answer until SIGTERM or SIGINT, then drain; `on_ready` is called with the address.

    Raises:
        UsageError: the address cannot be bound, or may not be used without TLS.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = GrpcServer(jobs, tokens, options)
    on_ready(await server.start())
    await stop.wait()
    await server.drain()


class GrpcServer:
    """A server on the running event loop: the two services, health and reflection."""

    def __init__(self, jobs: Jobs, tokens: Tokens, options: ServerOptions) -> None:
        check_exposure(options.host, has_tls=options.tls is not None, insecure=options.insecure)
        self._options = options
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "calls"))
        self._wakeups = JobWakeups(jobs)
        gate = Gate(tokens.authenticate, options.limits)
        self._server = grpc.aio.server(
            interceptors=[TokenForReflection(gate, f"/{reflection.SERVICE_NAME}/")],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=options.limits.calls_at_once,
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._add_services(jobs, gate)

    def _add_services(self, jobs: Jobs, gate: Gate) -> None:
        methods = job_calls.job_methods(
            job_calls.JobCalls(jobs=jobs),
            WatchStreams(jobs=jobs, wakeups=self._wakeups),
            LogStreams(jobs=jobs, wakeups=self._wakeups),
        )
        reports = report_calls.report_methods(report_calls.ReportCalls(jobs=jobs))
        self._server.add_generic_rpc_handlers(
            (
                gate.handlers(job_calls.SERVICE, methods),
                gate.handlers(report_calls.SERVICE, reports),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> str:
        """Listen and return the address with its actual port.

        Raises:
            UsageError: the address cannot be bound.
        """
        host, tls = self._options.host, self._options.tls
        wanted = f"{host}:{self._options.port}"
        try:
            if tls is None:
                port = self._server.add_insecure_port(wanted)
            else:
                port = self._server.add_secure_port(wanted, server_credentials(tls))
        except RuntimeError as error:
            raise UsageError(
                f"--listen {wanted}: cannot listen there (another program uses the port, the "
                f"address is not this machine's, or the certificate is wrong): {error}"
            ) from error
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    async def drain(self) -> None:
        """Refuse new calls, tell streams to connect again, let running calls finish."""
        _log.info("draining")
        await self._health.enter_graceful_shutdown()
        self._wakeups.close()
        await self._server.stop(self._options.drain_seconds)
