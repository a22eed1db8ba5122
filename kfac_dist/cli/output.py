"""Writes results to stdout: a table for people, JSON on one line or YAML for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 200  # columns where stdout is not a terminal, so that tables are not cut off


class Format(StrEnum):
    """The format of a result."""

    table = "table"
    json = "json"
    yaml = "yaml"


def write_result(value: Mapping[str, Any], output: Format, table: Table | None = None) -> None:
    """Write `value` to stdout; the format `table` writes `table`, by default keys and values."""
    if output is Format.json:
        _write(json.dumps(value, ensure_ascii=False))
    elif output is Format.yaml:
        import yaml

        _write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())
    else:
        write_table(table or key_table(value))


def write_table(table: Table) -> None:
    """Write a table to stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(markup=False, highlight=False, width=width).print(table)


def write_text(text: str) -> None:
    """Write a text to stdout."""
    _write(text)


def make_table(
    columns: Iterable[str], rows: Iterable[Sequence[Any]], right: Iterable[str]
) -> Table:
    """Return a plain table; the columns in `right` are aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    aligned = set(right)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in aligned else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_text(value) for value in row))
    return table


def key_table(value: Mapping[str, Any]) -> Table:
    """Return a table of keys and values, without None; nested keys are joined with dots."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for key, inner in _flatten(value, ""):
        table.add_row(key, _text(inner))
    return table


def _flatten(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flatten(inner, f"{path}{key}.")
        elif inner is not None:
            yield f"{path}{key}", inner


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
