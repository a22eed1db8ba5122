"""Read a specification from a file or a mapping, apply overrides, and check it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from kfac_dist.config.job import JobSpec
from kfac_dist.config.optimizers import KFACSpec
from kfac_dist.config.overrides import Override, apply_override, parse_override
from kfac_dist.config.problems import Problem, list_problems
from kfac_dist.config.spec_text import SpecText, read_spec_text
from kfac_dist.errors import InvalidSpecError

_Model = TypeVar("_Model", bound=BaseModel)
_DEFAULT_LABEL = "specification"


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read the specification in `path`, YAML or TOML, with `overrides` as `a.b=value`.

    Raises:
        NotFoundError: the file does not exist.
        UsageError: an override is not of the form key=value.
        InvalidSpecError: lists every problem, one a line, each with its file or override.
    """
    return _check(read_spec_text(path), [parse_override(text) for text in overrides])


def parse_spec(
    values: Mapping[str, Any], *, overrides: Sequence[str] = (), label: str = _DEFAULT_LABEL
) -> JobSpec:
    """Check a specification that is already a mapping; messages call it `label`.

    Raises:
        UsageError: an override is not of the form key=value.
        InvalidSpecError: lists every problem, one a line.
    """
    text = SpecText(label=label, values=dict(values))
    return _check(text, [parse_override(override) for override in overrides])


def dump_spec(spec: JobSpec) -> str:
    """Return a resolved specification as YAML, with every default."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def kfac_settings(options: Mapping[str, Any], owner: str = "KFAC") -> KFACSpec:
    """Check the keyword arguments of the serial optimizer and return them as a section.

    `damping` and `gamma` may be mappings or numbers; a number is the initial value.
    Messages begin with `owner`.

    Raises:
        InvalidSpecError: lists every problem, one a line.
    """
    values = {
        key: {"initial": value} if key in ("damping", "gamma") and _is_number(value) else value
        for key, value in options.items()
    }
    return _validate(KFACSpec, values, owner)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(text: SpecText, overrides: Sequence[Override]) -> JobSpec:
    values = copy.deepcopy(text.values)
    for override in overrides:
        apply_override(values, override)
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        problems = list_problems(JobSpec, error)
    problems.sort(key=lambda problem: text.lines.get(problem.path, 0))
    lines = [f"{_source(problem, text, overrides)}: {problem}" for problem in problems]
    raise InvalidSpecError("\n".join(lines))


def _source(problem: Problem, text: SpecText, overrides: Sequence[Override]) -> str:
    """Return where a problem comes from: the override that set it, or the file and line."""
    for override in overrides:
        if problem.path[: len(override.path)] == override.path:
            return f"--set {override.text}"
    line = text.lines.get(problem.path)
    return text.label if line is None else f"{text.label}:{line}"


def _validate(model: type[_Model], values: Mapping[str, Any], label: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = list_problems(model, error)
    raise InvalidSpecError("\n".join(f"{label}: {problem}" for problem in problems))
