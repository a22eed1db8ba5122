"""Overrides, `--set a.b=value`: they change a key of a specification before it is checked."""

from __future__ import annotations

from typing import Any, NamedTuple

from kfac_dist.config.spec_text import parse_value
from kfac_dist.errors import InvalidSpecError, UsageError


class Override(NamedTuple):
    """One override: the keys on its path, the value, and how the user wrote it."""

    path: tuple[str, ...]
    value: Any
    text: str


def parse_override(text: str) -> Override:
    """Parse `a.b=value`, the value as YAML.

    Raises:
        UsageError: the `=` is missing, a key is empty, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UsageError(f"--set {text}: must have the form key=value or section.key=value")
    try:
        return Override(path=path, value=parse_value(value), text=text)
    except ValueError as error:
        raise UsageError(f"--set {text}: the value is not YAML: {error}") from error


def apply_override(values: dict[str, Any], override: Override) -> None:
    """Set the key in `values`, in place, and create the sections on its path if missing.

    Raises:
        InvalidSpecError: the path leads through a value that is not a section.
    """
    section = values
    for depth, key in enumerate(override.path[:-1], start=1):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            where = ".".join(override.path[:depth])
            raise InvalidSpecError(
                f"--set {override.text}: {where} is {inner!r}, which has no keys to set"
            )
        section = inner
    section[override.path[-1]] = override.value
