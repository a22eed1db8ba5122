"""`kfac-dist serve`: the control plane, put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.connection import quiet_grpc
from kfac_dist.cli.environment import absolute, home
from kfac_dist.cli.options import OutputOption, StoreOption
from kfac_dist.cli.output import Format, write_result
from kfac_dist.cli.signals import terminate_is_interrupt
from kfac_dist.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from kfac_dist.service.access.tls import TlsFiles
    from kfac_dist.service.control.controller import Controller
    from kfac_dist.service.jobs import Jobs
    from kfac_dist.service.server.serving import ServerOptions
    from workers.cluster.head import Head

_LISTEN = "127.0.0.1:7341"
_WILDCARDS = ("0.0.0.0", "[::]", "::")
_LOG_BYTES, _LOG_FILES = 10_000_000, 3


def serve(
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 takes any."),
    ] = _LISTEN,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise",
            metavar="HOST:PORT",
            help="Where the drivers of jobs reach the server, when that is not --listen.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key, PEM.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca", metavar="FILE", help="Who vouches for it; else the certificate itself."
        ),
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            "--client-ca",
            metavar="FILE",
            help="Ask clients for a certificate of this authority, beside their token (mTLS).",
        ),
    ] = None,
    driver_cert: Annotated[
        Path | None,
        typer.Option(
            "--driver-cert",
            metavar="FILE",
            help="With --client-ca: what drivers of jobs, and commands of this user, show; else "
            "the server's own.",
        ),
    ] = None,
    driver_key: Annotated[
        Path | None,
        typer.Option("--driver-key", metavar="FILE", help="The key of --driver-cert, PEM."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without TLS all the same."),
    ] = False,
    store: StoreOption = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="URL",
            help="Jobs API of a Ray cluster, as http://HOST:8265; else one is started here.",
        ),
    ] = None,
    output: OutputOption = Format.table,
) -> None:
    """Serve jobs until SIGTERM or Ctrl-C. Jobs go on without the server, and it finds them again.

    Without --ray-address a Ray cluster is started on this machine, which outlives the server while
    jobs are active.
    """
    quiet_grpc()
    tls = _tls(tls_cert, tls_key, tls_ca, client_ca, driver_cert, driver_key)
    folder = home()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with terminate_is_interrupt(), ExitStack() as stack:
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
        raise UsageError("--driver-cert: no certificate is asked for without --client-ca")

    from kfac_dist.service.access.tls import TlsFiles

    tls = TlsFiles(
        certificate=absolute(cert),
        key=absolute(key),
        ca=_absolute(ca),
        client_ca=_absolute(client_ca),
        driver_certificate=_absolute(driver_cert),
        driver_key=_absolute(driver_key),
    )
    tls.check_shown()
    return tls


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else absolute(path)


def _options(listen: str, tls: TlsFiles | None, insecure: bool) -> ServerOptions:
    from kfac_dist.service.access.tls import check_exposure
    from kfac_dist.service.server.serving import ServerOptions

    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise UsageError(f"--listen {listen}: should be HOST:PORT, as {_LISTEN}")
    check_exposure(host, has_tls=tls is not None, insecure=insecure)
    return ServerOptions(host=host, port=int(port), tls=tls, insecure=insecure)


@contextmanager
def _only_server(folder: Path) -> Iterator[None]:
    from kfac_dist.runs.lock import FolderLock

    try:
        lock = FolderLock(folder)
    except ConflictError as error:
        raise ConflictError(
            f"{folder}: a server works with this home already; its address is in server.json there"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _compose(
    stack: ExitStack, folder: Path, store_url: str | None, ray_address: str | None
) -> Jobs:
    """Open the store, find or start the cluster, and start the controller."""
    from kfac_dist.cli.store import open_home_store
    from kfac_dist.service.access.local import ensure_local_token
    from kfac_dist.service.access.tokens import Tokens
    from kfac_dist.service.control.controller import Controller
    from kfac_dist.service.jobs import Jobs
    from workers.cluster.job_runner import RayJobRunner

    _log_to(folder / "server.log")
    store = open_home_store(folder, store_url)
    stack.callback(store.close)
    ensure_local_token(folder, Tokens(store))
    jobs = Jobs(store, folder)
    runner = RayJobRunner(ray_address) if ray_address else RayJobRunner.of_head(_head(folder))
    controller = Controller(jobs, runner)
    if ray_address is None:
        stack.callback(_leave_head, folder, controller)
    controller.start()
    stack.callback(controller.stop)
    return jobs


def _head(folder: Path) -> Head:
    """Return the cluster of this home, which is started if need be."""
    from workers.cluster.head import ensure_head

    typer.echo("starting Ray on this machine, or finding the one that runs", err=True)
    return ensure_head(folder)


def _leave_head(folder: Path, controller: Controller) -> None:
    """End the cluster of this home unless jobs need it."""
    from workers.cluster.head import end_head

    active = controller.num_active()
    if active:
        typer.echo(
            f"{active} active jobs go on without the server; kfac-dist serve finds them again, "
            "kfac-dist cluster down ends them",
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
    """Answer until the process is asked to end, and then drain."""
    import asyncio  # these cost --help too much

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
    """An address that listens everywhere, as one that can be connected to from here."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in _WILDCARDS else address


def _log_to(path: Path) -> None:
    """Write the server's log to a file, which a new one takes the place of when it is large."""
    import logging
    from logging.handlers import RotatingFileHandler

    handler = RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("kfac_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
