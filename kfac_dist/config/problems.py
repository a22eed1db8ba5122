"""Turn pydantic's errors into sentences: the path, the value, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kfac_dist.config.schema import Place, Schema, SchemaMap

_LONGEST_VALUE = 60


class Problem(NamedTuple):
    """One problem of a specification: the keys that lead to it, and the message."""

    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        """Write the path, if any, and the text."""
        return f"{'.'.join(self.path)}: {self.text}" if self.path else self.text


def list_problems(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Return every problem in `error`, which was raised when `model` was validated."""
    schema = SchemaMap(model)
    return [problem for details in error.errors() for problem in _problems(schema, details)]


def show(value: object) -> str:
    """Return a value as JSON, shortened to 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def did_you_mean(word: object, known: Collection[str]) -> str:
    """Return " Did you mean ...?" with the nearest of `known`; "" when none is near."""
    close = get_close_matches(str(word), known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _problems(schema: SchemaMap, details: ErrorDetails) -> Iterator[Problem]:
    kind, value = details["type"], details["input"]
    place = schema.locate(details["loc"])
    if kind == "value_error":
        yield from _related(place.path, str(details["ctx"]["error"]))
    elif kind == "extra_forbidden":
        yield Problem(place.path, _unknown_key(schema, place))
    elif kind == "missing":
        yield Problem(place.path, f"is missing; it must be {expected(schema, place)}")
    elif kind == "union_tag_invalid":
        tag, known = details["ctx"]["tag"], _names(schema, place)
        text = f"{show(tag)} is not {_one_of(known)}.{did_you_mean(tag, known)}"
        yield Problem((*place.path, "name"), text)
    elif kind == "invalid_key":
        yield Problem(place.path, "is not a key: keys are text")
    else:
        yield Problem(place.path, _wrong_value(schema, place, value))


def _related(section: tuple[str, ...], text: str) -> Iterator[Problem]:
    """Split the lines `key: text` that a section's own validator raised."""
    for line in text.splitlines():
        key, _, rest = line.partition(": ")
        yield Problem((*section, *key.split(".")), rest)


def _unknown_key(schema: SchemaMap, place: Place) -> str:
    *section, key = place.path
    named_so = [path for path in schema.paths() if path[-1] == key and path != place.path]
    elsewhere = dict.fromkeys(".".join(path) for path in named_so)
    if elsewhere:
        return f"unknown key here. Did you mean {' or '.join(elsewhere)}?"
    beside = get_close_matches(key, place.siblings, n=1)
    if beside:
        return f"unknown key. Did you mean {'.'.join([*section, beside[0]])}?"
    return f"unknown key. The keys here are {', '.join(dict.fromkeys(place.siblings))}"


def _wrong_value(schema: SchemaMap, place: Place, value: object) -> str:
    words = [word for option in schema.options(place) for word in option.get("enum", [])]
    text = f"{show(value)} is not {expected(schema, place)}"
    if words and isinstance(value, str):
        return f"{text}.{did_you_mean(value, words)}" if did_you_mean(value, words) else text
    types = {option.get("type") for option in schema.options(place)}
    if isinstance(value, str) and types & {"integer", "number"} and _is_number(value):
        return f"{text}; the quotes make it text"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(schema: SchemaMap, place: Place) -> list[str]:
    return [option["properties"]["name"]["const"] for option in schema.options(place)]


def expected(schema: SchemaMap, place: Place) -> str:
    """Return what a value at `place` must be: a noun with its interval or its choices."""
    options = schema.options(place)
    only = ", the only choice" if len(options) == 1 and "const" in options[0] else ""
    return " or ".join(dict.fromkeys(_describe(option) for option in options)) + only


def _describe(schema: Schema) -> str:
    """Return what a value must be to satisfy `schema`, as a noun."""
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return _one_of(schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number{_interval(schema)}"
    if kind == "string":
        pattern = "letters, digits, '.', '_' and '-', starting with a letter or digit"
        return f"text of {pattern}" if "pattern" in schema else "text"
    if kind == "object":
        keys = ", ".join(schema.get("properties", {}))
        return f"a mapping with keys among {keys}" if keys else "a mapping of names to values"
    if kind == "array":
        prefix = schema.get("prefixItems")
        return f"a list of {len(prefix)} numbers" if prefix else "a list of text"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "a plain value")


def _one_of(words: Collection[str]) -> str:
    return f"one of {', '.join(words)}"


def _interval(schema: Schema) -> str:
    bounds = [
        f"{word} {schema[key]:g}"
        for key, word in (
            ("exclusiveMinimum", "above"),
            ("minimum", "of at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "at most"),
        )
        if key in schema
    ]
    return " " + " and ".join(bounds) if bounds else ""
