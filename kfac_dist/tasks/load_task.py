"""Load the task that a specification names; every process that needs it does so itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kfac_dist._home import data_cache, default_home
from kfac_dist.config import JobSpec
from kfac_dist.config.problems import did_you_mean
from kfac_dist.data import Places, find_case_source, find_text_source
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks.arguments import check_arguments
from kfac_dist.tasks.autoencoder import autoencoder
from kfac_dist.tasks.blame import blame_user
from kfac_dist.tasks.char_transformer import char_transformer
from kfac_dist.tasks.classifier import classifier
from kfac_dist.tasks.find_class import find_class
from kfac_dist.tasks.task import Task
from kfac_dist.tasks.user import UserTask, check_user_task


class BuiltIn(NamedTuple):
    """A built-in task: `make` builds it from task_args and the data set that `source` finds."""

    make: Callable[..., Task]
    source: Callable[..., object]


BUILT_IN: Mapping[str, BuiltIn] = {
    "autoencoder": BuiltIn(autoencoder, find_case_source),
    "classifier": BuiltIn(classifier, find_case_source),
    "char_transformer": BuiltIn(char_transformer, find_text_source),
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type for `dtype: float32` or `float64`; InvalidSpecError for another."""
    if name not in _DTYPES:
        raise InvalidSpecError(f"dtype: {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_task(
    spec: JobSpec, base_dir: Path, *, data_dir: Path | None = None, cache_dir: Path | None = None
) -> Task:
    """Return the task that `spec` names, with its `task_args` and, if built in, its data set.

    Data is read or downloaded later, by `model`, `train_data` and `test_data`.

    Args:
        spec: the job specification.
        base_dir: the folder of the specification, in which the user's files are looked for.
        data_dir: the folder with the user's data, if any.
        cache_dir: where downloaded data sets are kept; by default `~/.kfac_dist/data`.

    Raises:
        InvalidSpecError: the specification does not fit the task.
        UserTaskError: the user's code raises.
    """
    if ":" in spec.task or spec.task.endswith(".py"):
        return _user_task(spec, base_dir, data_dir)
    if spec.task not in BUILT_IN:
        raise InvalidSpecError(
            f"task: there is no built-in task {spec.task!r} ({', '.join(BUILT_IN)}). Your "
            f"own task is file.py:Class or package.module:Class.{did_you_mean(spec.task, BUILT_IN)}"
        )
    built_in = BUILT_IN[spec.task]
    check_arguments(built_in.make, spec.task_args, f"task {spec.task}", supplied=("source",))
    cache = cache_dir or data_cache(default_home())
    source = built_in.source(
        spec.data.name,
        limit=spec.data.limit,
        places=Places(data_dir=data_dir, cache_dir=cache),
        dtype=torch_dtype(spec.dtype),
    )
    return built_in.make(source, **spec.task_args)


def _user_task(spec: JobSpec, base_dir: Path, data_dir: Path | None) -> UserTask:
    user_class, files = find_class(spec.task, base_dir)
    check_arguments(user_class, spec.task_args, f"task {spec.task}")
    with blame_user(files, f"{user_class.__name__}()", always=True):
        instance = user_class(**spec.task_args)
    check_user_task(instance, files)
    return UserTask(
        files=files,
        instance=instance,
        data_dir=data_dir,
        limit=spec.data.limit,
        dtype=torch_dtype(spec.dtype),
        seed=spec.seed,
    )
