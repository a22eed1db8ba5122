"""Check `task_args`: the names against a signature, and the values of built-in tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

from kfac_dist.config.problems import did_you_mean
from kfac_dist.errors import InvalidSpecError

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_arguments(
    function: Callable[..., object],
    arguments: Mapping[str, object],
    owner: str,
    supplied: Collection[str] = (),
) -> None:
    """Raise InvalidSpecError unless `function` can be called with `arguments` as keywords.

    `owner` is the task's name in messages, `supplied` the parameters that do not come from
    `task_args`. A function without a readable signature is not checked.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return
    accepted = [p for p in parameters if p.kind in _BY_KEYWORD and p.name not in supplied]
    names = [p.name for p in accepted]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for name in arguments:
        if name not in names and not takes_any:
            accepts = f"accepts {', '.join(names)}" if names else "accepts no arguments"
            raise InvalidSpecError(
                f"task_args.{name}: {owner} has no such argument; it {accepts}."
                f"{did_you_mean(name, names)}"
            )
    for parameter in accepted:
        if parameter.default is inspect.Parameter.empty and parameter.name not in arguments:
            raise InvalidSpecError(f"task_args.{parameter.name}: is missing; {owner} needs it")


def one_of(key: str, value: object, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`; raise InvalidSpecError otherwise."""
    if isinstance(value, str) and value in choices:
        return value
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise InvalidSpecError(f"task_args.{key}: {value!r} is not one of {', '.join(choices)}.{hint}")


def layer_sizes(key: str, value: object) -> tuple[int, ...]:
    """Return `value` as sizes of one or more layers; raise InvalidSpecError if it is not."""
    if not isinstance(value, list | tuple) or not value:
        raise InvalidSpecError(
            f"task_args.{key}: {value!r} is not a list of sizes such as [250, 30]"
        )
    for size in value:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidSpecError(
                f"task_args.{key}: the size {size!r} is not a whole number above 0"
            )
    return tuple(value)


def whole_number(key: str, value: object) -> int:
    """Return `value` if it is a whole number above 0; raise InvalidSpecError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InvalidSpecError(f"task_args.{key}: {value!r} is not a whole number above 0")


def true_or_false(key: str, value: object) -> bool:
    """Return `value` if it is true or false; raise InvalidSpecError otherwise."""
    if isinstance(value, bool):
        return value
    raise InvalidSpecError(f"task_args.{key}: {value!r} is not true or false")
