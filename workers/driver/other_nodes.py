"""What the driver does for nodes other than its own: send user code there, bring the logs here.

Each process writes its log and what it prints to files of its own node. So they outlive it, and the
last that a dying process printed arrives, too. On every node with a process of the job, a keeper
reads these files, and the driver appends what is new to those of the run folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kfac_dist.errors import JobFailedError
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.user_code import package_of
from kfac_dist.runs.writing import record_of_run
from workers.actor import Handle, Ref
from workers.cluster.node_actors import ArrivalsActor, NodeKeeperActor
from workers.exchange.messages import Delivery, JobContext
from workers.this_node import node_id

_LEAST_PAUSE_SECONDS = 0.5  # between two looks at the logs
_PAUSE_RATIO = 100  # looking may take a hundredth of the time of a core
_ANSWER_SECONDS = 5.0
_CATCH_UP_SECONDS = 5.0


@contextmanager
def other_nodes(
    job: JobContext, data_url: str | None, *, are_possible: bool
) -> Iterator[tuple[JobContext, Callable[[], None]]]:
    """Yield the job as processes on all nodes receive it, and a call that brings their logs here.

    The call waits until everything that was written before is in the run folder. After the block
    all has been copied, and nothing of the job is left on the other nodes. Where they are not
    possible, the cluster has one node, and nothing is done.

    Raises:
        InvalidSpecError: the user's code cannot be sent.
    """
    if not are_possible:
        yield job, lambda: None
        return
    package = package_of(job.spec, job.base_dir)
    arrivals = ArrivalsActor.options(scheduling_strategy=_on(node_id())).remote()
    delivery = Delivery(
        driver_node=node_id(),
        code=None if package is None else ray.put(package),
        data_url=data_url,
        arrivals=arrivals,
    )
    logs = _NodeLogs(job, arrivals)
    logs.start()
    try:
        yield replace(job, delivery=delivery), logs.catch_up
    finally:
        logs.close()
        ray.kill(arrivals)


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


@dataclass
class _Node:
    """A node's keeper, how much of each of its logs was copied, and a call that is still open."""

    keeper: Handle
    known: dict[str, int] = field(default_factory=dict)
    open_call: Ref | None = None
    is_lost: bool = False


class _NodeLogs:
    """Copies the logs of other nodes in a thread."""

    def __init__(self, job: JobContext, arrivals: Handle) -> None:
        self._job = job
        self._logs = RunPlaces(job.run_dir).logs
        self._arrivals = arrivals
        self._nodes: dict[str, _Node] = {}
        self._lock = threading.Lock()  # of everything above
        self._is_closed = threading.Event()
        self._problem: JobFailedError | None = None
        self._thread = threading.Thread(target=self._run, name="node-logs", daemon=True)

    def start(self) -> None:
        """Copy from now on."""
        self._thread.start()

    def _run(self) -> None:
        pause = _LEAST_PAUSE_SECONDS
        while not self._is_closed.wait(pause):
            started = time.thread_time()  # of this thread's own work, not of waiting
            try:
                with self._lock:
                    self._copy(whole_lines=True)
            except (
                RayError
            ):  # too busy to answer; if the cluster is lost, the driver's calls say so
                pause = _ANSWER_SECONDS
                continue
            except JobFailedError as error:
                self._problem = error
                return
            work_seconds = time.thread_time() - started
            pause = max(_LEAST_PAUSE_SECONDS, _PAUSE_RATIO * work_seconds)

    def catch_up(self) -> None:
        """Copy all that has been written by now; a node that does not answer in time is left out.

        Raises:
            JobFailedError: the run folder cannot be written.
        """
        if self._problem is not None:
            raise self._problem
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        try:
            with self._lock:
                while self._copy(whole_lines=False) and time.monotonic() < deadline:
                    pass
        except RayError:  # the cluster is lost; what is in the run folder is all there will be
            return

    def close(self) -> None:
        """Copy the rest, and end and remove what is left on the nodes."""
        self._is_closed.set()
        try:
            self.catch_up()
        finally:
            self._thread.join(_ANSWER_SECONDS)
            removals = [node.keeper.remove.remote() for node in self._nodes.values()]
            if removals:
                ray.wait(removals, num_returns=len(removals), timeout=_ANSWER_SECONDS)
            for node in self._nodes.values():
                ray.kill(node.keeper)

    def _copy(self, *, whole_lines: bool) -> bool:
        """Ask all keepers once, append what they have, and return whether anything was new."""
        self._meet()
        asked = {self._ask(node, whole_lines): node for node in self._living()}
        if not asked:
            return False
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        return sum(self._take(asked[call], call) for call in ready) > 0

    def _meet(self) -> None:
        """Start keepers on the nodes that are new."""
        for name in ray.get(self._arrivals.nodes.remote(), timeout=_ANSWER_SECONDS):
            if name not in self._nodes:
                keeper = NodeKeeperActor.options(scheduling_strategy=_on(name))
                self._nodes[name] = _Node(keeper.remote(self._job.job, self._job.attempt))

    def _living(self) -> Iterator[_Node]:
        return (node for node in self._nodes.values() if not node.is_lost)

    @staticmethod
    def _ask(node: _Node, whole_lines: bool) -> Ref:
        """Return a call to the keeper; one that is still open, as after a cut link, is kept."""
        if node.open_call is None:
            node.open_call = node.keeper.read.remote(node.known, whole_lines=whole_lines)
        return node.open_call

    def _take(self, node: _Node, call: Ref) -> bool:
        node.open_call = None
        try:
            chunks: dict[str, bytes] = ray.get(call)
        except ActorUnavailableError:  # its node is out of reach, or Ray starts it again
            return False
        except RayActorError:
            node.is_lost = True
            return False
        for name, chunk in chunks.items():
            _append(self._logs / name, chunk)
            node.known[name] = node.known.get(name, 0) + len(chunk)
        return bool(chunks)


def _append(path: Path, chunk: bytes) -> None:
    with record_of_run(path), path.open("ab") as file:
        file.write(chunk)
