"""`kfac-dist driver`: the hidden command with which the cluster runs an attempt of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kfac_dist.cli.environment import absolute, data_place, ray_address
from kfac_dist.cli.signals import terminate_is_interrupt
from kfac_dist.errors import ConflictError, FirstFailure, KfacDistError

if TYPE_CHECKING:
    from kfac_dist.service.control.launching import Launch
    from kfac_dist.service.job_records import ReportAnswer
    from kfac_dist.service.reporting.run_reader import DriverEnd
    from workers.cluster.interrupts import Interrupts
    from workers.driver.wishes import WishBox

_ROLE = "driver"
_PAUSE_PATIENCE_SECONDS = 60.0  # for the current step and its checkpoint
_FAILED = 1


class RayPlace(NamedTuple):
    """The Ray cluster of an attempt: where drivers connect, and its id; None where it is open."""

    address: str | None
    cluster_id: str | None


def driver(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's folder.")],
    attempt: Annotated[int, typer.Argument(metavar="ATTEMPT", help="The attempt's number.")],
    address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="The Ray cluster. Default: $RAY_ADDRESS.",
        ),
    ] = None,
    cluster_id: Annotated[
        str | None,
        typer.Option(
            "--ray-cluster", metavar="ID", help="The id that the cluster must have. Default: any."
        ),
    ] = None,
) -> None:
    """Run an attempt of a job that the server has prepared."""
    from kfac_dist.runs.logs import redirect_output
    from kfac_dist.service.control.launching import read_launch, read_token
    from kfac_dist.service.reporting.reporter import ReportClient, Reporter
    from kfac_dist.service.reporting.run_reader import RunReader, write_end
    from workers.cluster.interrupts import Interrupts
    from workers.driver.wishes import WishBox

    run_dir = absolute(run_dir)
    launch = read_launch(run_dir)
    if launch.attempt != attempt:  # the cluster started it after the controller had given it up
        raise ConflictError(f"{run_dir}: attempt {launch.attempt} has replaced attempt {attempt}")
    # The cluster would keep what is printed with its own logs.
    redirect_output(_log_path(run_dir, attempt))
    os.chdir(run_dir)  # the cluster may have been started in any folder, which no job should see
    interrupts = Interrupts()
    reader = RunReader(run_dir, launch.job, attempt)
    client = ReportClient(launch.home, read_token(run_dir))
    wishes = WishBox()
    with Reporter(reader, client, lambda answer: _obey(answer, interrupts, wishes)):
        place = RayPlace(address or ray_address(), cluster_id)
        end = _run(launch, run_dir, place, interrupts, wishes)
        write_end(run_dir, end)
    if end.state == "FAILED":
        raise typer.Exit(_FAILED)


def _log_path(run_dir: Path, attempt: int) -> Path:
    from kfac_dist.runs.run_places import RunPlaces

    return RunPlaces(run_dir).log(_ROLE, 0, attempt)


def _obey(answer: ReportAnswer, interrupts: Interrupts, wishes: WishBox) -> None:
    """Interrupt the job as the server orders; a cancellation overrides a pause, never back.

    The numbers of workers that the job shall have are passed on.
    """
    from workers.driver.wishes import WorkerWishes

    wishes.put(WorkerWishes(gradient=answer.gradient_workers, inverse=answer.inverse_workers))
    if interrupts.requested and interrupts.ends_as == "CANCELLED":
        return
    if answer.fenced or answer.order == "cancel":
        interrupts.request("CANCELLED")
    elif answer.order == "pause" and not interrupts.requested:
        interrupts.request("PAUSED", _PAUSE_PATIENCE_SECONDS)


def _run(
    launch: Launch, run_dir: Path, place: RayPlace, interrupts: Interrupts, wishes: WishBox
) -> DriverEnd:
    """Run the job and return how it ended; any exception becomes an end that the user sees."""
    from kfac_dist.runs import Failure
    from kfac_dist.runs.logs import open_log

    path = _log_path(run_dir, launch.attempt)
    log = open_log(path, job=launch.job, role=_ROLE, attempt=launch.attempt, pid=os.getpid())
    log.info("the driver has started")
    try:
        with terminate_is_interrupt():
            _train(launch, run_dir, place, interrupts, wishes)
    except KeyboardInterrupt:
        log.info("the driver was interrupted", ends_as=interrupts.ends_as)
        return _end(launch, interrupts.ends_as, reason="interrupted")
    except Exception as error:
        known = isinstance(error, KfacDistError)
        log.exception("the attempt failed" if known else "the attempt failed by a bug")
        return _end(launch, "FAILED", **Failure.from_error(error)._asdict())
    log.info("the attempt has succeeded")
    return _end(launch, "SUCCEEDED")


def _train(
    launch: Launch, run_dir: Path, place: RayPlace, interrupts: Interrupts, wishes: WishBox
) -> None:
    from kfac_dist.config import parse_spec
    from kfac_dist.runs import RunIdentity
    from kfac_dist.runs.run_places import RunPlaces
    from workers.cluster.cluster import check_cluster
    from workers.driver.launch import run_job
    from workers.driver.records.metrics_server import metrics_server

    if place.cluster_id is not None:
        check_cluster(place.address, place.cluster_id)
    with metrics_server(0) as metrics:
        run_job(
            parse_spec(launch.spec),
            base_dir=RunPlaces(run_dir).code,
            data_dir=data_place(launch.data_dir) if launch.data_dir else None,
            home=launch.home,
            run_dir=run_dir,
            resume=launch.resume,
            metrics=metrics,
            ray_address=place.address,
            identity=RunIdentity(job=launch.job, attempt=launch.attempt),
            interrupts=interrupts,
            wishes=wishes,
        )


def _end(
    launch: Launch,
    state: str,
    *,
    reason: str | None = None,
    message: str | None = None,
    first_failure: FirstFailure | None = None,
) -> DriverEnd:
    from kfac_dist.coordination.jobs.lifecycle import JobState
    from kfac_dist.service.reporting.run_reader import DriverEnd

    return DriverEnd(
        attempt=launch.attempt,
        state=JobState(state),
        reason=reason,
        message=message,
        first_failure=first_failure,
    )
