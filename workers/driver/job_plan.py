"""Predicts a job: its processes, memory, assignment of layers, and times of steps and refreshes.

Times and memory are measured in a few seconds, with a few steps of the serial optimizer on one
gradient worker's part of the first batch and with inverses of small matrices. Nothing is trained.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config import JobSpec, KFACSpec
from kfac_dist.coordination.steps.assignment import CostModel, LayerCost
from kfac_dist.coordination.steps.forecast import crowding, forecast_staleness
from kfac_dist.core.packing import packed_size
from kfac_dist.data import BatchedDataset, fetch
from kfac_dist.optim.optimizer import KFAC
from kfac_dist.tasks import (
    Task,
    build_model,
    class_axis_of,
    distribution_of,
    load_task,
    torch_dtype,
    working_folder,
)
from workers.device import plan_devices
from workers.driver.memory import (
    available_bytes,
    mapped_bytes,
    peak_bytes,
    reset_peak,
    resident_bytes,
)
from workers.driver.preparation import Preparation, prepare
from workers.exchange.messages import InverseSetup
from workers.exchange.shard_plan import ShardPlan
from workers.planning import batch_size, inverse_setups, shard_plan

_MEASURED_STEPS = 6
_FIRST_STEPS = 3  # left out: each of them refreshes the inverses, and the first warms up
# Copies of a layer's matrices that are alive at once. An inverse worker has averages, a snapshot
# and inverses for up to three gammas; the parameter server has the inverses.
_INVERSE_COPIES, _SERVER_COPIES = 5, 3
_SERVER_VECTORS = 4  # parameters, gradient, momentum, direction
_WORKER_VECTORS = 3  # parameters, gradient, direction
_SERIAL_COPIES = 2  # averages and inverses of the measured optimizer, which gradient workers lack
_STORE_COPIES = 4  # statistics and inverses on their way, in the part of Ray's store that is mapped
# Ray's connection, and the code that torch loads at the first step; torch 2.13 and Ray 2.60.
_RUNTIME_BYTES = 28 * 2**20


def job_plan(
    spec: JobSpec, base_dir: Path, *, data_dir: Path | None, cache_dir: Path
) -> dict[str, Any]:
    """Return the plan of a job, ready for JSON.

    The memory of a role is what this process held before it loaded the task, and then what the
    role adds: the data set and the model as they grew this process, the matrices and vectors of
    the algorithm, and for gradient workers the peak of a step. Files that are mapped, such as those
    of built-in data sets, count once for all processes. A shard in the process of a gradient worker
    adds to that process. A baseline has no layers and no refresh.
    Call it in a process that has not done anything else.

    Raises:
        InvalidSpecError: the specification does not fit the task, its data or its model.
        DataNotFoundError: the data are in neither folder.
        DataError: a value of the data cannot be used.
        UserTaskError: the user's task raised an error.
    """
    machine = _machine()
    process = resident_bytes()
    with working_folder(base_dir), _threads(spec.workers.threads or 1):
        task = load_task(spec, base_dir, data_dir=data_dir, cache_dir=cache_dir)
        num_parameters = _num_parameters(spec, task)
        model, mapped = resident_bytes(), mapped_bytes()
        preparation = prepare(spec, base_dir=base_dir, data_dir=data_dir, cache_dir=cache_dir)
        preparation.check_data()
        data, shared = resident_bytes(), max(0, mapped_bytes() - mapped)
        part = _first_part(spec, preparation)
        reset_peak()
        step_seconds = _step_seconds(spec, task, part)
        held = _Held(
            process=process + _RUNTIME_BYTES,
            model=max(0, model - process),
            data=max(0, data - model - shared),
            ahead=_num_ahead(spec, preparation) * sum(tensor.nbytes for tensor in part),
            step=max(0, peak_bytes() - data),
        )
        registration = preparation.registration
        setups = [] if registration is None else inverse_setups(spec, registration, 0)
        shards = shard_plan(spec, registration, num_parameters, spec.workers.num_shards)
    placement = list(_placement(spec, num_parameters, shards, setups, held))
    needed = shared + sum(row["processes"] * row["memory_bytes_each"] for row in placement)
    return {
        "job": spec.name,
        "num_parameters": num_parameters,
        "placement": placement,
        "layers": list(_layers(setups)),
        "predicted": _predicted(spec, step_seconds, setups, machine["cpus"]),
        "machine": machine | {"memory_bytes_shared": shared, "memory_bytes_needed": needed},
    }


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Bytes: of a process without a task; added by the model, the data, and the peak of a step.

    `ahead` is what the batches need that are read ahead.
    """

    process: int
    model: int
    data: int
    step: int
    ahead: int


def _machine() -> dict[str, Any]:
    """Return what this machine has, and how busy it is before anything is measured."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory_bytes_available": available_bytes(),
    }


def _placement(
    spec: JobSpec, num_parameters: int, shards: ShardPlan, setups: list[InverseSetup], held: _Held
) -> Iterator[dict[str, Any]]:
    workers, width = spec.workers, torch_dtype(spec.dtype).itemsize
    matrices = {setup.rank: sum(map(_num_elements, setup.layers)) for setup in setups}
    largest, total = max(matrices.values(), default=0), sum(matrices.values())
    # Each shard of the parameter server owns whole layers and their parameters.
    elements = {layer.name: _num_elements(layer) for setup in setups for layer in setup.layers}
    own = max(sum(elements.get(name, 0) for name in part.names) for part in shards.layouts)
    vectors = max(part.size for part in shards.layouts)
    shard = (_SERVER_VECTORS * vectors + _SERVER_COPIES * own) * width
    worker = (_WORKER_VECTORS * num_parameters + total) * width
    shares = workers.has_colocated_shards
    added = {
        "driver": held.model + held.data,
        "gradient_worker": held.model
        + held.data
        + held.ahead
        + max(worker, held.step - _SERIAL_COPIES * total * width)
        + (shard if shares else 0),
        "data_process": held.data + held.ahead // max(1, spec.data.num_workers),
        "inverse_worker": _INVERSE_COPIES * largest * width,
        "parameter_server": held.model + shard,
    }
    devices = plan_devices(workers, torch.cuda.device_count())
    member, inverse = devices.gpus_per_member, devices.gpus_per_inverse_worker
    counts = {
        "driver": (1, 0, 0.0),
        "gradient_worker": (workers.gradient, workers.threads or 1, member),
        "inverse_worker": (workers.inverse if setups else 0, 0, inverse),
        "parameter_server": (0 if shares else len(shards), 0, member),
    }
    if spec.data.num_workers:
        counts["data_process"] = (workers.gradient * spec.data.num_workers, 0, 0.0)
    received = _received(spec, vectors, num_parameters, setups)
    for role, (processes, cpus, gpus) in counts.items():
        store = 0 if role == "data_process" else _STORE_COPIES * total * width
        each = held.process + store
        yield {
            "role": role,
            "processes": processes,
            "shards_each": int(role == ("gradient_worker" if shares else "parameter_server")),
            "cpus_each": cpus,
            "gpus_each": gpus,
            "memory_bytes_each": each + added[role] if processes else 0,
            "received_bytes_each": received.get(role, 0) * width if processes else 0,
        }


def _received(
    spec: JobSpec, of_a_shard: int, num_parameters: int, setups: list[InverseSetup]
) -> dict[str, int]:
    """Return how many elements a process of each role receives in a step that has statistics.

    A shard receives its slice [Q] of every gradient, a gradient worker the direction [P]. All
    gradient workers together add up the packed factors [F], so each receives the others' parts of
    its share; then an inverse worker receives the sums of its layers.
    """
    number, shares = spec.workers.gradient, spec.workers.has_colocated_shards
    owned = [sum(packed_size(order) for one in s.layers for order in one.orders) for s in setups]
    slices = number * of_a_shard
    others = sum(owned) * (number - 1) // number
    return {
        "gradient_worker": num_parameters + others + (slices if shares else 0),
        "inverse_worker": max(owned, default=0),
        "parameter_server": slices,
    }


def _layers(setups: list[InverseSetup]) -> Iterator[dict[str, Any]]:
    for setup in setups:
        for layer in setup.layers:
            yield {
                "layer": layer.name,
                "orders": list(layer.orders),
                "inverse_worker": setup.rank,
                "inversion_seconds": setup.cost_model.layer_seconds(layer),
            }


def _predicted(
    spec: JobSpec, alone_seconds: float, setups: list[InverseSetup], num_cpus: int
) -> dict[str, float | bool | None]:
    """Return times and staleness, where a step takes `alone_seconds` on a core of its own."""
    refresh_alone = max((_refresh_seconds(s.cost_model, s.layers) for s in setups), default=0.0)
    crowded = crowding(_busy_threads(spec, alone_seconds, refresh_alone), num_cpus)
    step_seconds = alone_seconds * crowded
    times: dict[str, float | bool | None] = {
        "step_seconds": step_seconds,
        "step_seconds_alone": alone_seconds,
        "wall_seconds": spec.steps * step_seconds,
        "refresh_seconds": None,
        "staleness_mean": None,
        "staleness_max": None,
        "waits_at_bound": None,
    }
    if not setups or not isinstance(spec.optimizer, KFACSpec):
        return times
    refresh = refresh_alone * crowded
    period = spec.optimizer.inverse_update_period
    ages = forecast_staleness(step_seconds, refresh, period, spec.staleness.max_steps)
    if spec.staleness.max_steps == 0:  # a synchronous step waits for every refresh
        times["wall_seconds"] = spec.steps * (step_seconds + refresh / period)
    return times | {
        "refresh_seconds": refresh,
        "staleness_mean": ages.mean,
        "staleness_max": float(ages.max),
        "waits_at_bound": ages.waits,
    }


def _busy_threads(spec: JobSpec, step_seconds: float, refresh_seconds: float) -> float:
    """Return how many threads of the job compute during a step, on average."""
    workers = spec.workers
    busy: float = workers.gradient * (workers.threads or 1)
    if isinstance(spec.optimizer, KFACSpec):
        between = spec.optimizer.inverse_update_period * step_seconds
        busy += 1  # the server preconditions while the workers compute their statistics
        busy += workers.inverse * min(1.0, refresh_seconds / between if between > 0 else 1.0)
    return busy


def _refresh_seconds(model: CostModel, layers: tuple[LayerCost, ...]) -> float:
    return sum(model.layer_seconds(layer) for layer in layers)


def _num_elements(layer: LayerCost) -> int:
    return sum(order**2 for order in layer.orders)


def _num_parameters(spec: JobSpec, task: Task) -> int:
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _num_ahead(spec: JobSpec, preparation: Preparation) -> int:
    """Return how many batches a gradient worker reads ahead."""
    train = preparation.train
    is_safe = isinstance(train, BatchedDataset) and train.reads_in_threads
    return spec.data.prefetch_batches if spec.data.num_workers or is_safe else 0


def _first_part(spec: JobSpec, preparation: Preparation) -> tuple[Tensor, Tensor]:
    """Return a gradient worker's part of a batch as large as the first."""
    whole = batch_size(spec, 1, preparation.num_train_cases)
    return fetch(preparation.train, torch.arange(math.ceil(whole / spec.workers.gradient)))


def _step_seconds(spec: JobSpec, task: Task, part: tuple[Tensor, Tensor]) -> float:
    """Time a step between two refreshes, on a gradient worker's part of the first batch."""
    inputs, targets = part
    step = _step_function(spec, task)
    seconds = []
    for _ in range(_MEASURED_STEPS):
        started = time.perf_counter()
        step(inputs, targets)
        seconds.append(time.perf_counter() - started)
    return min(seconds[_FIRST_STEPS:])  # other load on the machine can only slow a step down


def _step_function(spec: JobSpec, task: Task) -> Callable[[Tensor, Tensor], object]:
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    if not isinstance(spec.optimizer, KFACSpec):
        return _gradient_function(model, task)
    options: Mapping[str, Any] = spec.optimizer.model_dump(exclude={"name"})
    # Inverse workers refresh beside the steps, so the steps that are timed must not.
    never = {"inverse_update_period": max(spec.optimizer.inverse_update_period, 1000)}
    return KFAC(
        model,
        distribution=task.distribution,
        class_axis=class_axis_of(task),
        seed=spec.seed,
        **(dict(options) | never),
    ).step


def _gradient_function(model: nn.Module, task: Task) -> Callable[[Tensor, Tensor], object]:
    distribution = distribution_of(task)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss = distribution.loss(model(inputs), targets).sum()
        torch.autograd.grad(loss, parameters)

    return step


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads inside the block, as a gradient worker does."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
