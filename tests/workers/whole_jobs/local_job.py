"""A whole job in the threads of one process: real gloo, real inverse loops, no Ray.

The roles' work is done by the same objects that the actors wrap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.tasks import build_model, load_task, torch_dtype
from tests.workers.whole_jobs.jobs import TASK
from workers.exchange.messages import (
    JobContext,
    RefreshRequest,
    Rendezvous,
    ServerReport,
    StatisticsMessage,
    StepOrder,
    WorkerReport,
)
from workers.exchange.process_group import Group, host_store, join_group, join_store
from workers.gradient_worker.build import build_gradient_work
from workers.gradient_worker.work import GradientWork
from workers.inverse_worker.loop import InverseLoop
from workers.inverse_worker.work import InverseWork
from workers.parameter_server.build import build_server
from workers.planning import batch_size, inverse_setups, staleness_bound, step_schedule

T = TypeVar("T")
HOST = "127.0.0.1"
CPU = torch.device("cpu")


def small_spec(**changes: Any) -> JobSpec:
    """A small autoencoder on 200 digits in float64; `changes` are sections or top-level keys."""
    task = {
        "task": "autoencoder",
        "task_args": {"hidden": [12, 5]},
        "data": {"name": "mnist-5k", "limit": 200},
        "batch_size": 50,
    }
    return parse_spec(_merged(_merged(_JOB, task), changes))


def chain_spec(folder: Path, **changes: Any) -> JobSpec:
    """A chain of four layers whose factors have full rank, on a task of milliseconds a step."""
    spec = {"task_args": {"depth": 3}} | changes
    return user_spec(folder, TASK, "Line", **spec)


def user_spec(folder: Path, source: str, name: str, **changes: Any) -> JobSpec:
    """A job on the task `name` of this source."""
    (folder / "task.py").write_text(source)
    task = {
        "task": f"task.py:{name}",
        "data": {"name": None},
        "batch_size": 40,
        "optimizer": {"damping": {"initial": 1.0}, "statistics_fraction": 1.0},
    }
    return parse_spec(_merged(_merged(_JOB, task), changes))


_JOB: dict[str, Any] = {
    "name": "small",
    "steps": 20,
    "dtype": "float64",
    "optimizer": {
        "damping": {"initial": 30.0},
        "gamma": {"adapt_period": 6},
        "inverse_update_period": 4,
        "statistics_fraction": 0.5,
        "fisher_fraction": 0.5,
        "averaging": {"decay": 0.9, "start": 5},
    },
    "staleness": {"max_steps": 0},
}


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        result[key] = {**values[key], **value} if both else value
    return result


def job_context(spec: JobSpec, folder: Path) -> JobContext:
    """The context of a job; each of its paths is `folder`."""
    return JobContext(
        job="local",
        attempt=1,
        spec=spec,
        base_dir=folder,
        data_dir=None,
        cache_dir=folder,
        run_dir=folder,
    )


def in_threads(calls: list[Callable[[], T]]) -> list[T]:
    """Call all at once, each in a thread of its own, and return their results in order."""
    # The number of OpenMP threads is set per thread, and it affects rounding.
    with ThreadPoolExecutor(len(calls), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def make_group(num_workers: int, epoch: int = 1, timeout_seconds: float = 20.0) -> list[Group]:
    """All members of a gloo group on the loopback device; the server is the last."""
    store = host_store(HOST, timeout_seconds)
    meet = Rendezvous(
        host=HOST,
        port=store.port,
        epoch=epoch,
        num_gradient_workers=num_workers,
        timeout_seconds=timeout_seconds,
    )

    def member(rank: int) -> Group:
        own = store if rank == num_workers else join_store(meet)
        return join_group(meet, own, rank=rank, own_host=HOST, backend="gloo", device=CPU)

    return in_threads([lambda rank=rank: member(rank) for rank in range(num_workers + 1)])


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint."""

    step: int
    cursor: SamplerCursor
    server: dict[str, Any]
    averages: dict[str, Any]


class LocalJob:
    """All roles of a job; `steps` trains, tests may look into `server` and `workers`."""

    def __init__(self, spec: JobSpec, tmp_path: Path, saved: Saved | None = None) -> None:
        self.saved = saved
        torch.set_num_threads(1)
        self.spec = spec
        self.context = job_context(spec, tmp_path)
        self.schedule = step_schedule(spec)
        self.bound = staleness_bound(spec)
        built = build_server(self.context, CPU, patience_seconds=20.0)
        self.server, self.store = built.server, built.store
        if saved is not None:
            self.server.restore(saved.server)
        self.loops = self._inverse_loops()
        self.workers = [
            build_gradient_work(self.context, rank, CPU, self._send)
            for rank in range(spec.workers.gradient)
        ]
        for worker in self.workers:
            _take_turns(worker)
        groups = make_group(spec.workers.gradient)
        joins: list[Callable[[], None]] = [
            lambda w=w, g=g: w.join(g) for w, g in zip(self.workers, groups, strict=False)
        ]
        in_threads([*joins, lambda: self.server.join(groups[-1])])
        for worker in self.workers:
            if self.loops:
                worker.connect(self.assignment, dict.fromkeys(self.assignment, 1))
        self.cursor = saved.cursor if saved else SamplerCursor(epoch=0, offset=0)
        self.num_cases = len(self.workers[0]._data["train"])
        self.step_count = saved.step if saved else 0
        self.worker_reports: list[WorkerReport] = []
        self.gammas = self.server.next_gammas(self.step_count + 1)

    def _inverse_loops(self) -> dict[int, InverseLoop]:
        if self.store is None:
            self.assignment: dict[int, tuple[str, ...]] = {}
            return {}
        spec = self.spec
        task = load_task(spec, self.context.base_dir, cache_dir=self.context.cache_dir)
        model = build_model(task, spec.seed, torch_dtype(spec.dtype))
        registration = register(model, spec.optimizer)
        setups = inverse_setups(
            spec, registration, applied_step=self.saved.step if self.saved else 0
        )
        self.assignment = {
            setup.rank: tuple(layer.name for layer in setup.layers) for setup in setups
        }
        loops = {}
        for setup in setups:
            rank = setup.rank
            work = InverseWork(self.context, setup, self.saved.averages if self.saved else None)
            loops[rank] = InverseLoop(work, self.store.accept)
            loops[rank].start()
        return loops

    def _send(self, worker: int, message: StatisticsMessage) -> None:
        self.loops[worker].put_statistics(message)

    def steps(self, count: int) -> list[ServerReport]:
        """Do `count` steps and return the server's reports."""
        return [self._step() for _ in range(count)]

    def _step(self) -> ServerReport:
        self.step_count += 1
        plan = self.schedule.plan(self.step_count)
        size = batch_size(self.spec, plan.step, self.num_cases)
        window, self.cursor = next_window(self.cursor, size, self.num_cases)
        order = StepOrder(plan=plan, window=window)
        if plan.refresh_inverses:
            exact = self.bound.is_exact(plan.step)
            minimum = plan.step if exact else 1
            request = RefreshRequest(
                step=plan.step, gammas=self.gammas, min_statistics_step=minimum, exact=exact
            )
            for loop in self.loops.values():
                loop.put_request(request)
        calls: list[Callable[[], Any]] = [lambda w=w: w.step(order) for w in self.workers]
        *self.worker_reports, report = in_threads([*calls, lambda: self.server.step(order)])
        self.gammas = report.next_gammas
        assert isinstance(report, ServerReport)
        return report

    def save(self) -> Saved:
        """Return the contents of a checkpoint after the last step."""
        averages: dict[str, Any] = {}
        for loop in self.loops.values():
            averages |= loop.snapshot(self.step_count, timeout_seconds=20.0)
        return Saved(self.step_count, self.cursor, self.server.snapshot(), averages)

    def close(self) -> None:
        """Stop the inverse loops."""
        for loop in self.loops.values():
            loop.stop()

    @property
    def parameters(self) -> torch.Tensor:
        """The server's parameter vector [P]."""
        return self.server.state.parameters


_FORWARD_MODE = threading.Lock()


def _take_turns(worker: GradientWork) -> None:
    """Let one thread at a time use forward mode: torch counts its levels per process."""
    computer = worker._computer
    alone = computer.fisher_sums

    def fisher_sums(*arguments: Any) -> FisherSums:
        with _FORWARD_MODE:
            return alone(*arguments)

    computer.fisher_sums = fisher_sums  # type: ignore[method-assign]
