"""How long does a refresh take for factors of each order, and how much of it is moving data?

Real inverse workers get statistics as gradient workers send them, for layers with two square
factors of one order. They are asked for an exact refresh, and send the inverses to an actor that
unpacks them as the parameter server does. `inverted` is the time in the inversions of the worker
that has most to do. `moved` is the rest of the wall time until the last inverse is unpacked: the
object store, the mailbox, adding up, averaging, packing and unpacking. Numbers of workers take
turns.

    python benchmarks/inversion.py --out benchmarks/results
    python benchmarks/inversion.py --short
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import ray
import torch
from report import add_output_options, deliver, document, surroundings, table

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.coordination.steps.assignment import DEFAULT_COST_MODEL, LayerCost, assign
from kfac_dist.runs import RunFolder
from workers.actor import Handle
from workers.cluster.cluster import ray_cluster
from workers.device import DevicePlan
from workers.exchange.messages import (
    InverseHeader,
    InverseMessage,
    InverseSetup,
    JobContext,
    RefreshRequest,
    StatisticsHeader,
)
from workers.exchange.parcels import StatisticsParcel, pack_tensors, unpack_inverses
from workers.inverse_worker.actor import InverseWorkerActor

ORDERS = (128, 256, 512, 1024, 2048)
SHORT_ORDERS = (64, 128)
NUM_LAYERS = 4
NUM_CASES = 8
GAMMA = 1.0
CPU_DEVICES = DevicePlan(kind="cpu", backend="gloo", gpus_per_member=0.0)


class Opened(NamedTuple):
    """When the last inverse was unpacked, by the monotonic clock, and the header of each."""

    monotonic_seconds: float
    headers: list[InverseHeader]


@ray.remote
class Receiver:
    """Unpacks inverses as the parameter server's store does."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._opened = Opened(0.0, [])

    def accept(self, message: InverseMessage) -> None:
        """Unpack the inverses of a layer."""
        list(unpack_inverses(message.parcel, torch.device("cpu")))
        self._opened = Opened(time.monotonic(), [*self._opened.headers, message.header])

    def collect_opened(self) -> Opened:
        """Return what arrived since the last call that found all layers."""
        opened = self._opened
        if len(opened.headers) == NUM_LAYERS:
            self._opened = Opened(0.0, [])
        return opened


class Refresh(NamedTuple):
    """Seconds of one refresh of all layers."""

    total: float
    inverted: float


class Workers:
    """Inverse workers that share the layers of one order."""

    def __init__(self, job: JobContext, order: int, num_workers: int) -> None:
        self._job = job
        layers = [LayerCost(name=f"layer{i}", orders=(order, order)) for i in range(NUM_LAYERS)]
        self._assignment = assign(layers, num_workers, DEFAULT_COST_MODEL)
        self._receiver = Receiver.remote()  # type: ignore[attr-defined]
        self._workers = {
            rank: self._start(rank, [layer for layer in layers if layer.name in names])
            for rank, names in self._assignment.items()
        }
        self._arrays = pack_tensors({"A": gram(order, 0), "G": gram(order, 1)})
        self._step = 0
        ray.get([worker.status.remote() for worker in self._workers.values()])

    def _start(self, rank: int, layers: Sequence[LayerCost]) -> Handle:
        setup = InverseSetup(
            rank=rank,
            layers=tuple(layers),
            links=(),
            cost_model=DEFAULT_COST_MODEL,
            assignment_epoch=1,
            applied_step=0,
            exact_step=0,
        )
        owners = {layer.name: self._receiver for layer in layers}
        return InverseWorkerActor.remote(self._job, setup, CPU_DEVICES, owners, None)

    def refresh(self) -> Refresh:
        """Send statistics, ask for a refresh, and wait until all inverses are unpacked."""
        self._step += 1
        started = time.monotonic()
        for rank, names in self._assignment.items():
            header = StatisticsHeader(
                job=self._job.job,
                step=self._step,
                num_cases=NUM_CASES,
                layers=names,
                assignment_epoch=1,
                usable=True,
            )
            parcel = StatisticsParcel(factors=dict.fromkeys(names, self._arrays), crosses={})
            self._workers[rank].update.remote(header, parcel)
            request = RefreshRequest(
                step=self._step, gammas=(GAMMA,), min_statistics_step=self._step
            )
            self._workers[rank].refresh.remote(request)
        opened = self._wait()
        seconds = {header.layer: header.inversion_seconds for header in opened.headers}
        by_worker = [sum(seconds[name] for name in names) for names in self._assignment.values()]
        return Refresh(total=opened.monotonic_seconds - started, inverted=max(by_worker))

    def _wait(self) -> Opened:
        while True:
            opened: Opened = ray.get(self._receiver.collect_opened.remote())
            if len(opened.headers) == NUM_LAYERS:
                return opened
            time.sleep(0.02)

    def stop(self) -> None:
        """End the actors."""
        for actor in (self._receiver, *self._workers.values()):
            ray.kill(actor)


def gram(order: int, seed: int) -> torch.Tensor:
    rows = torch.randn(2 * order, order, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / 2


def measure(
    job: JobContext, order: int, counts: Sequence[int], num_refreshes: int
) -> list[dict[str, Any]]:
    workers = {count: Workers(job, order, count) for count in counts}
    refreshes: dict[int, list[Refresh]] = {count: [] for count in counts}
    for number in range(num_refreshes + 1):
        for count, own in workers.items():
            refresh = own.refresh()
            if number:  # the first one warms up
                refreshes[count].append(refresh)
    for own in workers.values():
        own.stop()
    return [row(order, count, found) for count, found in refreshes.items()]


def row(order: int, count: int, refreshes: Sequence[Refresh]) -> dict[str, Any]:
    total = median(refresh.total for refresh in refreshes)
    inverted = median(refresh.inverted for refresh in refreshes)
    moved = median(refresh.total - refresh.inverted for refresh in refreshes)
    print(order, count, total, inverted, file=sys.stderr)
    return {
        "order": order,
        "inverse_workers": count,
        "refresh_ms": round(1e3 * total, 2),
        "inverted_ms": round(1e3 * inverted, 2),
        "moved_ms": round(1e3 * moved, 2),
        "moved_share": round(moved / total, 3),
    }


def job_context(folder: Path) -> JobContext:
    spec: JobSpec = parse_spec(
        {
            "name": "inversion",
            "task": "autoencoder",
            "steps": 1,
            "batch_size": 1,
            "optimizer": {"name": "kfac"},
        }
    )
    with RunFolder.create(folder, spec):
        pass
    return JobContext(
        job="inversion",
        attempt=1,
        spec=spec,
        base_dir=folder,
        data_dir=None,
        cache_dir=folder,
        run_dir=folder,
    )


def markdown(result: dict[str, Any]) -> str:
    names = ("order", "inverse_workers", "refresh_ms", "inverted_ms", "moved_ms", "moved_share")
    header = ["order", "inverse workers", "refresh, ms", "inverted, ms", "moved, ms", "moved share"]
    rows = [[*(row[name] for name in names), row["over_one_worker"]] for row in result["refreshes"]]
    return document(
        "A refresh by order of the factors and number of inverse workers",
        "`python benchmarks/inversion.py --out benchmarks/results`: "
        f"{NUM_LAYERS} layers, each with two factors of the order given, block-diagonal inverse, "
        "one gamma, one thread a worker, float32, statistics of one gradient worker. Median of "
        f"{result['num_refreshes']} refreshes, with the numbers of workers in turns. torch "
        f"{result['versions']['torch']}, Ray {result['versions']['ray']}, "
        f"{result['hardware']['cores']} cores.",
        "`inverted` is the time in the inversions of the worker that has most to do. `moved` is "
        "everything else, from sending the statistics to the last inverse that the server has "
        "opened.",
        table([*header, "refresh over one worker's"], rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--refreshes", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    orders = SHORT_ORDERS if arguments.short else ORDERS
    num_refreshes = 2 if arguments.short else arguments.refreshes
    started, rows = surroundings(), []
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        job = job_context(Path(folder) / "run")
        for order in orders:
            found = measure(job, order, arguments.workers, num_refreshes)
            first = found[0]["refresh_ms"]
            rows += [
                entry | {"over_one_worker": round(entry["refresh_ms"] / first, 3)}
                for entry in found
            ]
    result = {
        "question": "wall time of a refresh, inverted and moved, by order and inverse workers",
        **started,
        "seed": 0,
        "num_layers": NUM_LAYERS,
        "num_refreshes": num_refreshes,
        "refreshes": rows,
    }
    deliver("inversion", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
