"""Writes results to stdout: a table for people, JSON on one line or YAML for programs.

A time is a `datetime` until it is written: a table shows local time with its zone, JSON and YAML
have ISO 8601 in UTC. Every text is made safe for a terminal here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from kfac_dist.cli.terminal import one_line, plain

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_PIPE_WIDTH = 200  # columns where stdout is not a terminal, so that tables are not cut off


class Format(StrEnum):
    """The format of a result."""

    table = "table"
    json = "json"
    yaml = "yaml"


def write_result(value: Mapping[str, Any], output: Format, table: Table | None = None) -> None:
    """Write `value` to stdout; the format `table` writes `table`, by default keys and values."""
    if output is Format.json:
        _write(as_json(value))
    elif output is Format.yaml:
        _write(as_yaml(value))
    else:
        write_table(table or key_table(value))


def as_json(value: Any) -> str:
    """Return `value` as JSON on one line."""
    return plain(json.dumps(value, ensure_ascii=False, default=_utc))


def as_yaml(value: Any) -> str:
    """Return `value` as YAML without a last newline."""
    import yaml

    values = json.loads(json.dumps(value, default=_utc))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if plain(text) != text:  # YAML leaves some marks as they are, unless it escapes all but ASCII
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return text.rstrip()


def moment(seconds: float | None) -> datetime | None:
    """Return Unix seconds as a time to write, None for None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def local_time(seconds: float) -> str:
    """Return Unix seconds as local time with its zone, such as `2026-01-31 14:05:09 CET`."""
    return _local(datetime.fromtimestamp(seconds, UTC))


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _utc(value: Any) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_table(table: Table) -> None:
    """Write a table to stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def write_text(text: str) -> None:
    """Write a text to stdout."""
    _write(plain(text))


def say(text: str) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(plain(text) + "\n")
    sys.stderr.flush()


def make_table(
    columns: Iterable[str],
    rows: Iterable[Sequence[Any]],
    right: Iterable[str],
    *,
    cut: str | None = None,
) -> Table:
    """Return a plain table; the columns in `right` are aligned to the right.

    With `cut` each row has one line: texts of that column are cut off where the table would be too
    wide. Otherwise texts are folded.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns, aligned = tuple(columns), set(right)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in aligned else "left"
        whole = cut not in (None, column)
        table.add_column(plain(column), justify=justify, overflow="fold", no_wrap=whole)
    is_cut = [column == cut for column in columns]
    for row in rows:
        cells = (_cell(value, cut=here) for value, here in zip(row, is_cut, strict=True))
        table.add_row(*cells)
    return table


def key_table(value: Mapping[str, Any]) -> Table:
    """Return a table of keys and values, without None; nested keys are joined with dots."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for key, inner in _flatten(value, ""):
        table.add_row(plain(key), _cell(inner, cut=False))
    return table


def _flatten(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flatten(inner, f"{path}{key}.")
        elif inner is not None:
            yield f"{path}{key}", inner


def _cell(value: Any, *, cut: bool) -> Text:
    """Return a value as a cell, which rich shows as it is, without markup."""
    from rich.text import Text

    if cut:
        return Text(one_line(_text(value)), no_wrap=True, overflow="ellipsis")
    return Text(plain(_text(value)))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return _local(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
