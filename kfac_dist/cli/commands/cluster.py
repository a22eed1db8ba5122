"""`kfac-dist cluster`: the Ray cluster on this machine, which outlives servers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kfac_dist.cli.environment import home, only_this_user, ready_home
from kfac_dist.cli.options import OutputOption, StoreOption
from kfac_dist.cli.output import Format, say, write_result
from kfac_dist.errors import ConflictError, NotFoundError

cluster_app = typer.Typer(
    name="cluster", help="Start, show or end the Ray cluster on this machine."
)


@cluster_app.command()
def up(output: OutputOption = Format.table) -> None:
    """Start the cluster of this home, unless it runs already.

    The server starts the cluster by itself, so this is never required.
    """
    from workers.cluster.head import ensure_head

    with only_this_user():
        ensure_head(ready_home(say))
    write_result(_facts(), output)


@cluster_app.command()
def status(output: OutputOption = Format.table) -> None:
    """Show the addresses and the resources of this home's cluster."""
    write_result(_facts(), output)


@cluster_app.command()
def down(
    force: Annotated[
        bool, typer.Option("--force", help="End it even while jobs are active; they end too.")
    ] = False,
    store: StoreOption = None,
    output: OutputOption = Format.table,
) -> None:
    """End the cluster of this home, with everything that runs on it.

    A server that runs does not start it again; kfac-dist cluster up does.
    """
    from workers.cluster.head import end_head

    num_active, newest = _active_jobs(store)
    if num_active and not force:
        shown = ", ".join(newest) + (", ..." if num_active > len(newest) else "")
        raise ConflictError(
            f"{num_active} jobs are active on the cluster ({shown}); cancel them "
            "first, or end them together with the cluster by --force"
        )
    write_result({"ended": end_head(home())}, output)


def _facts() -> dict[str, Any]:
    from workers.cluster.head import read_head
    from workers.cluster.job_runner import RayJobRunner

    head = read_head(home())
    if head is None:
        raise NotFoundError(
            f"no cluster runs with the home {home()}; start one with kfac-dist cluster up or "
            "kfac-dist serve"
        )
    room = RayJobRunner.of_head(head).resources()
    return {
        "gcs_address": head.gcs_address,
        "jobs_url": head.jobs_url,
        "pid": head.pid,
        "num_cpus": room.num_cpus,
        "num_gpus": room.num_gpus,
        "num_inverse_slots": room.num_inverse_slots,
    }


def _active_jobs(store_url: str | None) -> tuple[int, list[str]]:
    """Return how many jobs have an attempt on the cluster, and the ids of the newest of them."""
    from kfac_dist.cli.store import open_home_store
    from kfac_dist.coordination.jobs.lifecycle import ACTIVE
    from kfac_dist.service.jobs import Jobs

    store = open_home_store(ready_home(say), store_url)
    try:
        jobs = Jobs(store, home())
        newest, _ = jobs.list(states=ACTIVE, page_size=5)
        return jobs.count(states=ACTIVE), [job.id for job in newest]
    finally:
        store.close()
