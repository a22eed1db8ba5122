"""The JSON Schema of a specification, and finding one's way in it.

The schema also words the messages: what a key may be is read from it, so that no message can
disagree with the check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from kfac_dist.config.job import JobSpec

Schema = dict[str, Any]


def job_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a job specification."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class Place(NamedTuple):
    """A place in a specification.

    `path` are its keys, `options` the schemas of what may stand there (several where there is a
    choice), `siblings` the names of all keys beside it.
    """

    path: tuple[str, ...]
    options: tuple[Schema, ...]
    siblings: tuple[str, ...]


class SchemaMap:
    """The schema of `model`, to be walked by pydantic's error locations."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._root = model.model_json_schema()

    def locate(self, location: Sequence[str | int]) -> Place:
        """Follow `location`; the tags that pydantic puts there for a choice are left out."""
        place = Place(path=(), options=(self._root,), siblings=())
        for key in location:
            place = self._step(place, key)
        return place

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Every key of the specification, as a path."""
        return self._below((), self._root)

    def _step(self, place: Place, key: str | int) -> Place:
        options = [deep for option in place.options for deep in self._resolve(option)]
        if isinstance(key, int):
            inner = [item for option in options for item in _items(option, key)]
            return Place((*place.path, str(key)), tuple(inner), ())
        keys = tuple(name for option in options for name in option.get("properties", {}))
        chosen = [option for option in options if key in _tags(option)]
        if chosen and key not in keys:
            return place._replace(options=tuple(chosen))
        inner = [option["properties"][key] for option in options if key in _properties(option)]
        # A mapping of names that the user chooses has one schema for all its values.
        inner += [
            values
            for option in options
            if isinstance(values := option.get("additionalProperties"), dict)
        ]
        return Place((*place.path, key), tuple(inner), keys)

    def _resolve(self, schema: Schema) -> list[Schema]:
        if "$ref" in schema:
            return self._resolve(self._root["$defs"][schema["$ref"].removeprefix("#/$defs/")])
        choices = schema.get("anyOf") or schema.get("oneOf")
        return (
            [deep for choice in choices for deep in self._resolve(choice)] if choices else [schema]
        )

    def _below(self, path: tuple[str, ...], schema: Schema) -> Iterator[tuple[str, ...]]:
        for option in self._resolve(schema):
            for name, inner in _properties(option).items():
                yield (*path, name)
                yield from self._below((*path, name), inner)

    def options(self, place: Place) -> list[Schema]:
        """The schemas at `place` without references and nested choices."""
        return [deep for option in place.options for deep in self._resolve(option)]

    def tag(self, schema: Schema) -> str:
        """Name a choice by its constant, such as `kfac`; "" when it has none."""
        return next((tag for tag in _tags(schema) if "properties" in schema), "")


def _properties(schema: Schema) -> dict[str, Schema]:
    properties: dict[str, Schema] = schema.get("properties", {})
    return properties


def _items(schema: Schema, index: int) -> list[Schema]:
    """The schema of an element of a list: its own, or that of all."""
    own: list[Schema] = schema.get("prefixItems", [])[index:][:1]
    return own or [schema["items"]] if "items" in schema else own


def _tags(schema: Schema) -> list[str]:
    """What pydantic calls this choice: the constant in its properties, or one of these words."""
    if "properties" not in schema:
        return ["constant", "word"]
    if "schedule" in schema["properties"]:
        return ["scheduled"]
    return [inner["const"] for inner in _properties(schema).values() if "const" in inner]
