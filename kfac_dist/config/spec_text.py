"""Read the text of a specification: YAML with the types of YAML 1.2, or TOML.

PyYAML implements YAML 1.1, which reads `1e-5` as text, `no` as false and `1:30` as 90. In a
specification these are a number and two texts. A key that occurs twice in a mapping is refused.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.errors import InvalidSpecError, NotFoundError


class _Loader(yaml.SafeLoader):
    """Safe YAML with the types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor below raises for it
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_DIGIT_STARTS = list("-+0123456789.")
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", _DIGIT_STARTS),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", _DIGIT_STARTS),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _DIGIT_STARTS),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if "x" in text else 10)  # in YAML 1.2, 010 is ten


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True, kw_only=True)
class SpecText:
    """A specification as read: its `values`, and `label`, the name of its file.

    `lines` maps the path of a key to its line, counted from 1; empty for TOML.
    """

    label: str
    values: dict[str, Any]
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)


def read_spec_text(path: Path) -> SpecText:
    """Read a .yaml, .yml, .json or .toml file.

    Raises:
        NotFoundError: the file does not exist.
        InvalidSpecError: the file cannot be read, or its syntax is wrong; names line and column.
    """
    text = _read(path)
    if path.suffix == ".toml":
        return SpecText(label=path.name, values=_parse_toml(path.name, text))
    values, lines = _parse_yaml(path.name, text)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}"
        raise InvalidSpecError(f"{path.name}: {found}, but a specification is a mapping of keys")
    return SpecText(label=path.name, values=values, lines=lines)


def parse_value(text: str) -> Any:
    """Parse one YAML value, as in `--set key=value`.

    Raises:
        ValueError: the syntax is wrong.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_yaml_message(error)) from error


def _read(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml", ".json", ".toml"):
        raise InvalidSpecError(f"{path}: a specification is a .yaml, .yml, .json or .toml file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: the specification does not exist") from error
    except UnicodeDecodeError as error:
        raise InvalidSpecError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise InvalidSpecError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_toml(label: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpecError(f"{label}: {error}") from error


def _parse_yaml(label: str, text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _collect_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        raise InvalidSpecError(f"{where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InvalidSpecError(f"{label}: {_yaml_message(error)}") from error


def _collect_lines(
    node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        lines[here] = key.start_mark.line + 1
        _collect_lines(value, here, lines)


def _yaml_message(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return str(error.problem or error.context)
    return str(error).splitlines()[0]
