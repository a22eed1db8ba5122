"""Builds the work of a gradient worker: its task, data, model and statistics sender."""

from __future__ import annotations

from functools import partial

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.data import MapDataset, Split
from kfac_dist.tasks import build_model, distribution_of, load_task, torch_dtype
from workers.exchange.messages import JobContext
from workers.gradient_worker.batches import BatchReader
from workers.gradient_worker.statistics_sender import SendStatistics, StatisticsSender
from workers.gradient_worker.work import GradientWork
from workers.planning import shard_plan, structure_of


def build_gradient_work(
    job: JobContext, device: torch.device, send: SendStatistics
) -> GradientWork:
    """Build the work of a gradient worker; it sends its statistics through `send`.

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
    reader = BatchReader(
        data["train"],
        seed=spec.seed,
        device=device,
        least_cases=registration.least_cases if registration else 1,
        allowed_targets=job.allowed_targets,
    )
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
        computer=computer,
        reader=reader,
        sender=sender,
        plan_shards=partial(shard_plan, spec, registration, num_parameters),
        has_moments=has_moments,
        averaging=spec.optimizer.averaging,
        evaluation_limit=spec.evaluation.limit,
        allowed_targets=job.allowed_targets,
    )
