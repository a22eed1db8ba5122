"""Are the arguments of the optimizers what they should be? Those that no section checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.config.problems import did_you_mean, show
from kfac_dist.core.blocks.sites import Site
from kfac_dist.errors import InvalidSpecError

# Options of `KFAC` about the step, which here is the user's own optimizer's.
_FOREIGN = (
    "step_rule",
    "gamma",
    "l2",
    "fisher_fraction",
    "averaging",
    "lr",
    "momentum",
    "precondition_dtype",
)
_ARGUMENTS = (
    "distribution",
    "case_axis",
    "class_axis",
    "damping",
    "norm_constraint",
    "lr",
    "process_group",
    "seed",
    "calls",
)
_PRECONDITIONER = "KFACPreconditioner"
_SHOWN = 8  # names in a message


def check_count(owner: str, name: str, value: object) -> int:
    """Return a whole number, 0 or above.

    Raises:
        InvalidSpecError: `value` is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise InvalidSpecError(f"{owner}: {name}: {show(value)} is not a whole number, 0 or above")
    return int(value)


def check_number(owner: str, name: str, value: object, *, zero: bool = False) -> float:
    """Return a finite number above 0, with `zero` also 0 itself.

    Raises:
        InvalidSpecError: `value` is something else.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    wanted = "a finite number, 0 or above" if zero else "a finite number above 0"
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidSpecError(f"{owner}: {name}: {_shown(value)} is not {wanted}")
    if value < 0 or (value == 0 and not zero):
        raise InvalidSpecError(f"{owner}: {name}: {_shown(value)} is not {wanted}")
    return float(value)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else show(value)


def check_delays(owner: str, delays: Mapping[str, Any], layers: Collection[str]) -> dict[str, int]:
    """Return `delay_steps`, checked: whole numbers of steps, patterns that match a layer.

    Raises:
        InvalidSpecError: a number is wrong, or a pattern matches no layer.
    """
    for pattern in delays:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise InvalidSpecError(
                f"{owner}: delay_steps: {pattern} matches no layer; the layers are {_some(layers)}"
            )
    return {
        pattern: check_count(owner, f"delay_steps.{pattern}", delay)
        for pattern, delay in delays.items()
    }


def check_fused(owner: str, settings: KFACSpec, sites: Iterable[Site]) -> None:
    """Check that each pattern of `fused_outputs`, defaults left out, matches a linear layer.

    Raises:
        InvalidSpecError: a pattern matches none.
    """
    default = KFACSpec.model_fields["fused_outputs"].default
    layers = [
        name
        for site in sites
        if site.rule is not None and site.rule.is_linear
        for name in site.owners
    ]
    for pattern, count in settings.fused_outputs.items():
        if default.get(pattern) != count and not any(fnmatchcase(n, pattern) for n in layers):
            raise InvalidSpecError(
                f"{owner}: fused_outputs: {pattern} matches no linear layer; these are "
                f"{_some(layers)}"
            )


def _some(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    if not unique:
        return "none"
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(repr(name) for name in unique[:_SHOWN]) + more


def preconditioner_settings(damping: float, options: Mapping[str, Any]) -> KFACSpec:
    """Return the settings of a preconditioner; messages name only options that it has.

    Raises:
        InvalidSpecError: an option is unknown, out of range, or about the step.
    """
    _check_names(options)
    bounds = KFACSpec().damping
    if not bounds.min <= check_number(_PRECONDITIONER, "damping", damping) <= bounds.max:
        raise InvalidSpecError(
            f"{_PRECONDITIONER}: damping: {damping:g} is not between {bounds.min:g} and "
            f"{bounds.max:g}"
        )
    settings = kfac_settings({"damping": damping, **options}, _PRECONDITIONER)
    if settings.fisher_type == "empirical":
        raise InvalidSpecError(
            f'{_PRECONDITIONER}: fisher_type "empirical" needs the targets, which it does not see; '
            'use "mc" or "exact"'
        )
    return settings


def _check_names(options: Mapping[str, Any]) -> None:
    wrong = [name for name in options if name in _FOREIGN]
    if wrong:
        raise InvalidSpecError(
            f"{_PRECONDITIONER} has no option {', '.join(wrong)}: it computes directions, and your "
            "own optimizer takes the step"
        )
    hidden = (*_FOREIGN, *_ARGUMENTS, "name")
    known = [*_ARGUMENTS, *(name for name in KFACSpec.model_fields if name not in hidden)]
    for name in options:
        if name not in known:
            near = did_you_mean(name, known) or f" The options are {', '.join(known)}"
            raise InvalidSpecError(f"{_PRECONDITIONER} has no option {name}.{near}")
