"""What Python code may call: a job in the foreground, and the registration report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfac_dist._home import default_home
from kfac_dist.config import JobSpec, KFACSpec, load_spec, parse_spec
from kfac_dist.config.urls import is_url
from kfac_dist.core.blocks.registration import register
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.factor_memory import check_factor_memory
from kfac_dist.runs import JobSummary
from kfac_dist.tasks import build_model, load_task, torch_dtype, working_folder
from workers.driver.launch import run_job
from workers.driver.records.metrics_server import metrics_server


def train(
    spec: JobSpec | Mapping[str, Any] | str | Path,
    *,
    data_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    metrics_port: int | None = None,
) -> JobSummary:
    """Run a job in the foreground and return its summary.

    If Ray is already initialised in this process, the job uses it.

    Args:
        spec: a specification, a mapping with its keys, or the path of its file. The files of a
            user's task are looked for beside that file, otherwise in the working folder.
        data_dir: the folder in which data are looked for first, before the cache, or its URL.
        run_dir: the run folder; by default a folder in `~/.kfac_dist/runs`.
        resume: continue the run in the folder from its newest checkpoint.
        metrics_port: serve metrics to this machine while the job runs. 0 takes a free port; the
            event `metrics_served` has the address.

    Raises:
        KfacDistError: the specification is wrong, or the job failed.
    """
    base_dir = Path.cwd()
    if isinstance(spec, str | Path):
        base_dir = Path(spec).absolute().parent
        spec = load_spec(Path(spec))
    elif not isinstance(spec, JobSpec):
        spec = parse_spec(spec)
    with metrics_server(metrics_port) as metrics:
        return run_job(
            spec,
            base_dir=base_dir,
            data_dir=str(data_dir) if is_url(str(data_dir or "")) else _absolute(data_dir),
            home=default_home(),
            run_dir=_absolute(run_dir),
            resume=resume,
            metrics=metrics,
        )


def _absolute(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def layers_report(
    spec: JobSpec, base_dir: Path, *, data_dir: Path | None, cache_dir: Path
) -> list[dict[str, Any]]:
    """Return one row for each trainable parameter: its block, factor sizes and cost.

    Data are looked for in `data_dir` and `cache_dir`, if the model's shape depends on them.

    Raises:
        InvalidSpecError: the optimizer has no blocks, or a parameter is in no block.
        UserTaskError: the user's task raised an error.
        DataNotFoundError: the model's shape depends on data that are in neither folder.
    """
    if not isinstance(spec.optimizer, KFACSpec):
        raise InvalidSpecError(
            f"optimizer.name: {spec.optimizer.name} has no curvature blocks, only kfac has"
        )
    with working_folder(base_dir):
        task = load_task(spec, base_dir, data_dir=data_dir, cache_dir=cache_dir)
        model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    registration = register(model, spec.optimizer)
    check_factor_memory(registration, next(p for p in model.parameters() if p.requires_grad))
    return [row._asdict() for row in registration.report]
