"""Builds the work of a gradient worker: its task, data, model and statistics sender."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.data import BatchedDataset, MapDataset, Split
from kfac_dist.tasks import build_model, distribution_of, load_task, torch_dtype
from workers.exchange.messages import JobContext
from workers.gradient_worker.batches import BatchReader
from workers.gradient_worker.data_processes import ProcessReader
from workers.gradient_worker.evaluation import chunk_cases
from workers.gradient_worker.reading import CaseReader, PlainReader, ThreadReader
from workers.gradient_worker.statistics_sender import SendStatistics, StatisticsSender
from workers.gradient_worker.work import GradientWork
from workers.planning import batch_size, shard_plan, structure_of


def build_gradient_work(
    job: JobContext, number: int, device: torch.device, send: SendStatistics
) -> GradientWork:
    """Build the work of a gradient worker; it sends its statistics through `send`.

    `number` is its first rank, for messages.

    Raises:
        InvalidSpecError: the model has a parameter that K-FAC has no block for.
        UserTaskError: the user's task raised.
    """
    spec = job.spec
    settings = spec.optimizer if isinstance(spec.optimizer, KFACSpec) else None
    task = load_task(spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
    data: dict[Split, MapDataset] = {"train": task.train_data(), "test": task.test_data()}
    model = build_model(task, spec.seed, torch_dtype(spec.dtype)).to(device)
    registration = register(model, settings) if settings else None
    computer = BatchComputer(
        model,
        distribution=distribution_of(task),
        seed=spec.seed,
        registration=registration,
        fisher_type=settings.fisher_type if settings else "mc",
    )
    cases = _case_reader(job, data, number)
    reader = BatchReader(
        cases,
        device=device,
        least_cases=registration.least_cases if registration else 1,
        prefetch_batches=spec.data.prefetch_batches,
    )
    part_cases = batch_size(spec, 1, len(data["train"])) // spec.workers.gradient
    sender: StatisticsSender | None = None
    has_moments = False
    if settings is not None and registration is not None:
        structure = structure_of(settings, registration)
        sender = StatisticsSender(job, settings, computer, structure.links, send)
        has_moments = structure.observes_moments
    num_parameters = sum(parameter.numel() for parameter in computer.parameters)
    return GradientWork(
        task=task,
        data=data,
        cases=cases,
        computer=computer,
        reader=reader,
        sender=sender,
        plan_shards=partial(shard_plan, spec, registration, num_parameters),
        has_moments=has_moments,
        averaging=spec.optimizer.averaging,
        evaluation_limit=spec.evaluation.limit,
        evaluation_chunk=chunk_cases(data["train"], part_cases),
    )


def _case_reader(job: JobContext, data: Mapping[Split, MapDataset], number: int) -> CaseReader:
    options, seed, allowed = job.spec.data, job.spec.seed, job.allowed_targets
    if options.num_workers:
        return ProcessReader(job, data, number)
    is_safe = all(isinstance(d, BatchedDataset) and d.reads_in_threads for d in data.values())
    if options.prefetch_batches and is_safe:
        return ThreadReader(data, seed=seed, allowed=allowed, folder=job.cache_dir)
    return PlainReader(data, seed=seed, allowed=allowed, folder=job.cache_dir)
