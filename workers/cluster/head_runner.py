"""Runs attempts of jobs on the embedded cluster of a home, also when that cluster is started again.

The cluster may end while the server runs: its keeper was killed, or one of Ray's daemons died. A
new cluster has other addresses and another secret. So nothing is remembered
from one request to the next without looking at `head.json` first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import (
    AttemptKey,
    JobRunner,
    Remnant,
    RunnerState,
    RunnerStatus,
)
from kfac_dist.errors import KfacDistError, UnreachableError
from workers.cluster.head import Head, ensure_head, read_head, was_ended
from workers.cluster.job_runner import RayJobRunner
from workers.cluster.leftovers import Traces, kill_processes, processes_of

_log = logging.getLogger("kfac_dist.cluster")

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 5.0, 300.0
_CLOSE_SECONDS = 150.0  # a little more than a start may take

_ENDED = "the Ray cluster that it ran on has ended"
_STARTS_AGAIN = "the Ray cluster of this home has ended; it is being started again"
_ENDED_BY_REQUEST = (
    "the Ray cluster of this home was ended by kfac-dist cluster down; kfac-dist cluster up starts "
    "it again"
)


class HeadJobRunner:
    """A JobRunner on the cluster of a home.

    If the cluster does not live, its attempts are over as soon as their processes have ended. The
    cluster is then started again in the background, unless a user has ended it.
    """

    def __init__(
        self,
        home: Path,
        *,
        start: Callable[[Path], Head] = ensure_head,
        runner_of: Callable[[Head, Traces], JobRunner] = RayJobRunner.of_head,
    ) -> None:
        """Connect on first use; `start` starts a cluster, `runner_of` makes the runner on one."""
        self._home = home
        self._start = start
        self._runner_of = runner_of
        self._traces = Traces()
        self._lock = threading.Lock()
        self._known: tuple[Head, JobRunner] | None = None
        self._starter: threading.Thread | None = None
        self._problem: str | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._start_after = 0.0
        self._is_closed = False

    def close(self) -> None:
        """Start no cluster any more; wait for one that is being started."""
        with self._lock:
            self._is_closed = True
            starter = self._starter
        if starter is not None:
            starter.join(_CLOSE_SECONDS)

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        """Start the driver; submitting an attempt again does not start a second one."""
        runner = self._reached()
        if runner.status(key).state is RunnerState.UNKNOWN:
            # It may have been submitted to the cluster before; two drivers must never run.
            kill_processes(key.submission_id)
        runner.submit(key, run_dir)

    def stop(self, key: AttemptKey) -> None:
        """Send the driver SIGTERM; end it by force where its cluster has ended."""
        runner = self._living()
        if runner is None:
            self.kill(key)
        else:
            runner.stop(key)

    def kill(self, key: AttemptKey) -> None:
        """End all of the attempt by force."""
        runner = self._living()
        if runner is None:
            self._traces.note(key)
            kill_processes(key.submission_id)
        else:
            runner.kill(key)

    def status(self, key: AttemptKey) -> RunnerStatus:
        """Return how the cluster sees the attempt; it is over when the cluster has ended."""
        runner = self._living()
        if runner is not None:
            return runner.status(key)
        why = self._start_again()
        if processes_of(key.submission_id):  # the guard has not cleaned up yet
            return RunnerStatus(state=RunnerState.RUNNING, message=why)
        return RunnerStatus(state=RunnerState.FAILED, message=_ENDED)

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        """Return all attempts in Ray's table, none when the cluster has ended."""
        runner = self._living()
        return {} if runner is None else runner.list()

    def resources(self) -> Room:
        """Return all the room of the cluster."""
        return self._reached().resources()

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """Return what still exists of the attempt in Ray's tables and on this machine."""
        runner = self._living()
        return self._traces.remains(key) if runner is None else runner.remains(key)

    def _reached(self) -> JobRunner:
        """Return the runner on the living cluster.

        Raises:
            UnreachableError: no cluster lives now; one is being started, unless a user ended it.
        """
        runner = self._living()
        if runner is None:
            raise UnreachableError(self._start_again())
        return runner

    def _living(self) -> JobRunner | None:
        head = read_head(self._home)
        if head is None:
            return None
        with self._lock:
            if self._known is None or self._known[0] != head:
                self._known = head, self._runner_of(head, self._traces)
            return self._known[1]

    def _start_again(self) -> str:
        """Start the cluster in the background if it is time to; return what happens now."""
        if was_ended(self._home):
            return _ENDED_BY_REQUEST
        with self._lock:
            is_starting = self._starter is not None and self._starter.is_alive()
            if not is_starting and not self._is_closed and time.monotonic() >= self._start_after:
                _log.warning(_STARTS_AGAIN)
                self._starter = threading.Thread(
                    target=self._start_in_background, name="head-starter", daemon=True
                )
                self._starter.start()
            return _STARTS_AGAIN + (f" (last try: {self._problem})" if self._problem else "")

    def _start_in_background(self) -> None:
        try:
            head = self._start(self._home)
        except (KfacDistError, OSError) as error:
            problem = error.message if isinstance(error, KfacDistError) else str(error)
            _log.error("%s; the next try is in %g s", problem, self._pause_seconds)
            with self._lock:
                self._problem = problem
                self._start_after = time.monotonic() + self._pause_seconds
                self._pause_seconds = min(_LAST_PAUSE_SECONDS, 2 * self._pause_seconds)
            return
        _log.info("the Ray cluster of this home runs again (pid %d)", head.pid)
        with self._lock:
            self._problem, self._pause_seconds = None, _FIRST_PAUSE_SECONDS
