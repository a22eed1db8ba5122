"""`kfac-dist serve`: assembles the control plane and runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.connection import quiet_grpc
from kfac_dist.cli.environment import absolute, only_this_user, ready_home
from kfac_dist.cli.options import OutputOption, StoreOption
from kfac_dist.cli.output import Format, say, write_result
from kfac_dist.cli.signals import terminate_is_interrupt
from kfac_dist.cli.terminal import plain
from kfac_dist.errors import ConflictError, UnreachableError, UsageError

if TYPE_CHECKING:
    from kfac_dist.service.access.tls import TlsFiles
    from kfac_dist.service.control.controller import Controller
    from kfac_dist.service.jobs import Jobs
    from kfac_dist.service.server.serving import ServerOptions

_LISTEN = "127.0.0.1:7341"
_WILDCARDS = ("0.0.0.0", "[::]", "::")
_LOG_BYTES, _LOG_FILES = 10_000_000, 3


def serve(
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="Where to listen; port 0 picks a free one."
        ),
    ] = _LISTEN,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise",
            metavar="HOST:PORT",
            help="Where the drivers of jobs reach the server. Default: the value of --listen.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert", metavar="FILE", help="PEM file of the server's certificate chain."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="FILE", help="PEM file of the key of --tls-cert."),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            metavar="FILE",
            help="PEM file of the authority that signed --tls-cert. Default: --tls-cert itself.",
        ),
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            "--client-ca",
            metavar="FILE",
            help="Require a certificate of this authority from clients, besides a token (mTLS).",
        ),
    ] = None,
    driver_cert: Annotated[
        Path | None,
        typer.Option(
            "--driver-cert",
            metavar="FILE",
            help="With --client-ca, the certificate that drivers and this user's commands show. "
            "Default: --tls-cert.",
        ),
    ] = None,
    driver_key: Annotated[
        Path | None,
        typer.Option("--driver-key", metavar="FILE", help="PEM file of the key of --driver-cert."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow listening beyond this machine without TLS."),
    ] = False,
    store: StoreOption = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="URL",
            help="Jobs API of a Ray cluster, for example http://HOST:8265. Default: start a "
            "cluster on this machine.",
        ),
    ] = None,
    output: OutputOption = Format.table,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Jobs continue to run without the server; the next one finds them again. Without --ray-address,
    the server starts a Ray cluster on this machine, which outlives it while jobs are active.
    """
    quiet_grpc()
    _check_ray_url(ray_address)
    tls = _tls(tls_cert, tls_key, tls_ca, client_ca, driver_cert, driver_key)
    with terminate_is_interrupt(), ExitStack() as stack:
        stack.enter_context(only_this_user())
        folder = ready_home(say)
        stack.enter_context(_only_server(folder))
        options = _options(listen, tls, insecure)
        jobs = _compose(stack, folder, store, ray_address)
        _serve(jobs, options, folder, advertise, output)


def _tls(
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    client_ca: Path | None,
    driver_cert: Path | None,
    driver_key: Path | None,
) -> TlsFiles | None:
    if not any((cert, key, client_ca, driver_cert, driver_key)):
        return None
    if cert is None or key is None:
        raise UsageError("TLS needs both --tls-cert and --tls-key")
    if (driver_cert is None) != (driver_key is None):
        raise UsageError("--driver-cert and --driver-key go together")
    if driver_cert is not None and client_ca is None:
        raise UsageError("--driver-cert: has no effect without --client-ca; give both or neither")

    from kfac_dist.service.access.tls import TlsFiles

    tls = TlsFiles(
        certificate=absolute(cert),
        key=absolute(key),
        ca=_absolute(ca),
        client_ca=_absolute(client_ca),
        driver_certificate=_absolute(driver_cert),
        driver_key=_absolute(driver_key),
    )
    for warning in tls.check():
        typer.echo(f"warning: {warning}", err=True)
    tls.check_shown()
    return tls


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else absolute(path)


def _options(listen: str, tls: TlsFiles | None, insecure: bool) -> ServerOptions:
    from kfac_dist.service.access.tls import check_exposure
    from kfac_dist.service.server.serving import ServerOptions

    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise UsageError(f"--listen {listen}: must be HOST:PORT, for example {_LISTEN}")
    check_exposure(host, has_tls=tls is not None, insecure=insecure)
    return ServerOptions(host=host, port=int(port), tls=tls, insecure=insecure)


@contextmanager
def _only_server(folder: Path) -> Iterator[None]:
    from kfac_dist.runs.lock import FolderLock

    try:
        lock = FolderLock(folder)
    except ConflictError as error:
        raise ConflictError(
            f"{folder}: another server already uses this home; server.json in it has its address"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _compose(
    stack: ExitStack, folder: Path, store_url: str | None, ray_address: str | None
) -> Jobs:
    """Open the store, find or start the cluster, and start the controller.

    `stack` gets what must be undone in the end, in reverse order.
    """
    from kfac_dist.cli.store import open_home_store
    from kfac_dist.service.access.local import ensure_local_token
    from kfac_dist.service.access.tokens import Tokens
    from kfac_dist.service.control.controller import Controller
    from kfac_dist.service.jobs import Jobs
    from workers.cluster.head_runner import HeadJobRunner
    from workers.cluster.job_runner import RayJobRunner

    _log_to(folder / "server.log")
    store = open_home_store(folder, store_url)
    stack.callback(store.close)
    ensure_local_token(folder, Tokens(store))
    jobs = Jobs(store, folder)
    runner: RayJobRunner | HeadJobRunner
    if ray_address is None:
        _start_head(folder)
        runner = HeadJobRunner(folder)
        controller = Controller(jobs, runner)
        stack.callback(_leave_head, folder, controller)
        stack.callback(runner.close)
    else:
        runner = RayJobRunner(ray_address)
        _check_ray(ray_address)
        controller = Controller(jobs, runner)
    controller.start()
    stack.callback(controller.stop)
    return jobs


def _check_ray_url(ray_address: str | None) -> None:
    if ray_address is not None:
        from workers.cluster.jobs_api import check_url

        check_url(ray_address)


def _check_ray(ray_address: str) -> None:
    """Refuse a cluster that cannot be used; only warn of one that does not answer now."""
    from workers.cluster.jobs_api import check_answer

    try:
        check_answer(ray_address)
    except UnreachableError as error:
        typer.echo(f"warning: {error.message}; jobs wait until a cluster answers", err=True)


def _start_head(folder: Path) -> None:
    """Start the cluster of this home unless it runs."""
    from workers.cluster.head import ensure_head

    typer.echo("starting Ray on this machine, unless it runs already", err=True)
    ensure_head(folder)


def _leave_head(folder: Path, controller: Controller) -> None:
    """End the cluster of this home, unless jobs need it."""
    from workers.cluster.head import end_head

    active = controller.num_active()
    if active:
        typer.echo(
            f"{active} active jobs continue to run without the server; kfac-dist serve finds them "
            "again, kfac-dist cluster down ends them",
            err=True,
        )
    else:
        end_head(folder)


def _serve(
    jobs: Jobs,
    options: ServerOptions,
    folder: Path,
    advertise: str | None,
    output: Format,
) -> None:
    """Answer calls until the process is asked to end, then drain."""
    import asyncio  # imported here, like the modules below, to keep --help fast

    from kfac_dist.service.access.local import local_server, remove_server, write_server
    from kfac_dist.service.access.tokens import Tokens
    from kfac_dist.service.server.serving import serve as answer

    def on_ready(address: str) -> None:
        server = local_server(advertise or _reachable(address), options.tls)
        write_server(folder, server)
        facts = {"address": server.address, "pid": server.pid, "home": str(folder)}
        write_result(facts, output)

    try:
        asyncio.run(answer(jobs, Tokens(jobs.store), options, on_ready))
    finally:
        remove_server(folder)


def _reachable(address: str) -> str:
    """Replace the host of an address that listens on all interfaces by one to connect to."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in _WILDCARDS else address


def _log_to(path: Path) -> None:
    """Write the server's log to a file that is rotated when it is large."""
    import logging
    from logging.handlers import RotatingFileHandler

    class PlainFormatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return plain(super().format(record))  # the log is read on a terminal

    handler = RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8"
    )
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(PlainFormatter(form, datefmt="%Y-%m-%d %H:%M:%S%z"))
    logger = logging.getLogger("kfac_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
