"""The files of a job on this machine, which may have no folder in common with the driver's.

On the driver's node everything is where the driver has it. On any other node a job has a folder of
its own below the node's temporary folder, with the user's code and the logs. Data sets that come
from a URL, and downloads, are in that node's own cache.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import ray

from kfac_dist._home import DEFAULT_HOME, data_cache
from kfac_dist.errors import ConflictError
from kfac_dist.runs.lock import locked
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.fetch import fetch_folder, fetched_folder
from kfac_dist.runs.transfer.package import unpack_whole
from workers.exchange.messages import JobContext

_HOME_VARIABLE = "KFAC_DIST_HOME"  # where the node was started, as on the command line
_PRIVATE = 0o700


def node_id() -> str:
    """Return Ray's name of the node that this process runs on."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


def on_this_node(job: JobContext) -> JobContext:
    """Return `job` with the paths of this machine; `bring_files` fills them.

    Raises:
        ConflictError: the folder of the job belongs to another user of this machine.
    """
    delivery = job.delivery
    if delivery is None or (node := node_id()) == delivery.driver_node:
        return job
    # Before anything can fail here, so that the driver fetches the logs.
    ray.get(delivery.arrivals.note.remote(node))
    places = RunPlaces(attempt_folder(job.job, job.attempt, node))
    _make_private(places.folder.parent)
    places.logs.mkdir(parents=True, exist_ok=True)
    cache = data_cache(Path(os.environ.get(_HOME_VARIABLE) or DEFAULT_HOME).expanduser())
    url = delivery.data_url
    return replace(
        job,
        base_dir=places.code,
        run_dir=places.folder,
        cache_dir=cache,
        data_dir=fetched_folder(url, cache) if url else job.data_dir,
    )


def job_folder(job: str, node: str) -> Path:
    """Return the folder of a job on a node, with those of its attempts; nothing is created."""
    return Path(tempfile.gettempdir()) / f"kfac_dist-{os.getuid()}-{job}-{node[:12]}"


def attempt_folder(job: str, attempt: int, node: str) -> Path:
    """Return the folder that stands for the run folder on a node; nothing is created."""
    return job_folder(job, node) / f"a{attempt}"


def _make_private(folder: Path) -> None:
    """Make a folder that no other user can write, under a name that others can guess."""
    folder.mkdir(mode=_PRIVATE, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():
        raise ConflictError(f"{folder}: belongs to another user; remove it from this machine")


def bring_files(job: JobContext) -> None:
    """Bring the user's code and the data sets of `on_this_node` to this machine, once for a node.

    Processes of the job on this node wait for the first of them.

    Raises:
        KfacDistError: the data cannot be fetched.
    """
    delivery = job.delivery
    if delivery is None or node_id() == delivery.driver_node:
        return
    code = RunPlaces(job.run_dir).code
    if delivery.code is not None:
        with locked(job.run_dir / "code.lock"):
            if not code.exists():
                unpack_whole(ray.get(delivery.code), code)
    if delivery.data_url:
        fetch_folder(delivery.data_url, job.cache_dir)
