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

from kfac_dist.config import JobSpec, KFACSpec, parse_spec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.tasks import build_model, load_task, torch_dtype
from tests.workers.whole_jobs.jobs import TASK
from workers.exchange.arrays import to_tensor
from workers.exchange.messages import (
    InverseMessage,
    JobContext,
    RefreshRequest,
    Rendezvous,
    ServerReport,
    ShardReport,
    StatisticsMessage,
    StepOrder,
    WorkerReport,
    merge_reports,
)
from workers.exchange.process_group import Group, host_store, join_group, join_store
from workers.exchange.shard_plan import merge_snapshots, split_snapshot
from workers.gradient_worker.build import build_gradient_work
from workers.gradient_worker.work import GradientWork
from workers.inverse_worker.loop import InverseLoop
from workers.inverse_worker.work import InverseWork
from workers.parameter_server.build import ShardBuilder
from workers.planning import (
    batch_size,
    inverse_setups,
    shard_plan,
    staleness_bound,
    step_schedule,
)

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


def make_group(
    num_workers: int, num_shards: int = 1, epoch: int = 1, timeout_seconds: float = 20.0
) -> list[Group]:
    """All members of a gloo group on the loopback device; the shards follow the workers."""
    store = host_store(HOST, timeout_seconds)
    meet = Rendezvous(
        host=HOST,
        port=store.port,
        epoch=epoch,
        num_gradient_workers=num_workers,
        num_shards=num_shards,
        step=0,
        timeout_seconds=timeout_seconds,
    )

    def member(rank: int) -> Group:
        own = store if rank == num_workers else join_store(meet)
        return join_group(meet, own, rank=rank, own_host=HOST, backend="gloo", device=CPU)

    size = num_workers + num_shards
    return in_threads([lambda rank=rank: member(rank) for rank in range(size)])


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
        model = build_model(
            load_task(spec, tmp_path, cache_dir=tmp_path), spec.seed, torch_dtype(spec.dtype)
        )
        kfac = isinstance(spec.optimizer, KFACSpec)
        self.registration = register(model, spec.optimizer) if kfac else None
        num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        wanted = spec.workers.num_shards
        self.plan = shard_plan(spec, self.registration, num_parameters, wanted)
        self.loops: dict[int, InverseLoop] = {}
        builder = ShardBuilder(self.context, CPU, 20.0, self._request)
        self.shards = [builder.build(number, wanted) for number in range(len(self.plan))]
        if saved is not None:
            for number, shard in enumerate(self.shards):
                shard.shard.restore(split_snapshot(self.plan, saved.server, number))
        self.loops |= self._inverse_loops()
        self.workers = [
            build_gradient_work(self.context, rank, CPU, self._send)
            for rank in range(spec.workers.gradient)
        ]
        for worker in self.workers:
            _take_turns(worker)
        groups = make_group(spec.workers.gradient, len(self.plan))
        members = [*self.workers, *(built.shard for built in self.shards)]
        step = saved.step if saved else 0
        in_threads([lambda m=m, g=g: m.join(g, step) for m, g in zip(members, groups, strict=True)])
        for worker in self.workers:
            if self.loops:
                worker.connect(self.assignment, dict.fromkeys(self.assignment, 1))
        self.cursor = saved.cursor if saved else SamplerCursor(epoch=0, offset=0)
        self.num_cases = len(self.workers[0]._data["train"])
        self.step_count = saved.step if saved else 0
        self.worker_reports: list[WorkerReport] = []
        self.shard_reports: list[ShardReport] = []

    def _inverse_loops(self) -> dict[int, InverseLoop]:
        if self.registration is None:
            self.assignment: dict[int, tuple[str, ...]] = {}
            return {}
        setups = inverse_setups(
            self.spec, self.registration, applied_step=self.saved.step if self.saved else 0
        )
        self.assignment = {
            setup.rank: tuple(layer.name for layer in setup.layers) for setup in setups
        }
        loops = {}
        for setup in setups:
            rank = setup.rank
            work = InverseWork(self.context, setup, self.saved.averages if self.saved else None)
            loops[rank] = InverseLoop(work, self._accept)
            loops[rank].start()
        return loops

    def _accept(self, message: InverseMessage) -> None:
        name = message.header.layer
        owner = next(n for n, layout in enumerate(self.plan.layouts) if name in layout.names)
        store = self.shards[owner].store
        assert store is not None
        store.accept(message)

    def _send(self, _step: int, messages: Mapping[int, list[StatisticsMessage]]) -> None:
        for rank, own in messages.items():
            for message in own:
                self.loops[rank].put_statistics(message)

    def _request(self, request: RefreshRequest) -> None:
        for loop in self.loops.values():
            loop.put_request(request)

    def steps(self, count: int) -> list[ServerReport]:
        """Do `count` steps and return the server's reports."""
        return [self._step() for _ in range(count)]

    def _step(self) -> ServerReport:
        self.step_count += 1
        plan = self.schedule.plan(self.step_count)
        size = batch_size(self.spec, plan.step, self.num_cases)
        window, self.cursor = next_window(self.cursor, size, self.num_cases)
        order = StepOrder(plan=plan, window=window)
        members = [*self.workers, *(built.shard for built in self.shards)]
        reports: list[Any] = in_threads([lambda m=m: m.step(order) for m in members])
        self.worker_reports = reports[: len(self.workers)]
        self.shard_reports = reports[len(self.workers) :]
        return merge_reports(
            self.shard_reports, self.registration.names if self.registration else ()
        )

    def save(self) -> Saved:
        """Return the contents of a checkpoint after the last step."""
        averages: dict[str, Any] = {}
        for loop in self.loops.values():
            averages |= loop.snapshot(self.step_count, timeout_seconds=20.0)
        snapshots = [built.shard.snapshot() for built in self.shards]
        merged = merge_snapshots(self.plan, snapshots)
        return Saved(self.step_count, self.cursor, merged, averages)

    @property
    def server(self) -> Any:
        """The first shard, which owns everything if it is the only one."""
        return self.shards[0].shard

    def close(self) -> None:
        """Stop the inverse loops."""
        for loop in self.loops.values():
            loop.stop()

    @property
    def parameters(self) -> torch.Tensor:
        """The parameter vector [P] of all shards."""
        return self.plan.whole([built.shard.state.parameters for built in self.shards])

    @property
    def averaged(self) -> torch.Tensor:
        """The averaged parameter vector [P] of all shards."""
        slices = [to_tensor(built.shard.state.averaged()) for built in self.shards]
        return self.plan.whole(slices)


_FORWARD_MODE = threading.Lock()


def _take_turns(worker: GradientWork) -> None:
    """Let one thread at a time use forward mode: torch counts its levels per process."""
    computer = worker._computer
    alone = computer.fisher_sums

    def fisher_sums(*arguments: Any) -> FisherSums:
        with _FORWARD_MODE:
            return alone(*arguments)

    computer.fisher_sums = fisher_sums  # type: ignore[method-assign]
