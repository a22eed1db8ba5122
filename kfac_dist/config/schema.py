"""The JSON Schema of a specification, and how to look up a key in it.

Messages take what a key accepts from the schema, so they always agree with the check.
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

    `path` is the keys that lead there, `options` the schemas of what it may hold (several where
    there is a choice), `siblings` the names of all keys in the same section.
    """

    path: tuple[str, ...]
    options: tuple[Schema, ...]
    siblings: tuple[str, ...]


class SchemaMap:
    """The schema of `model`, addressed by the locations in pydantic's errors."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._root = model.model_json_schema()

    def locate(self, location: Sequence[str | int]) -> Place:
        """Follow `location` and drop the tags by which pydantic marks a choice."""
        place = Place(path=(), options=(self._root,), siblings=())
        for key in location:
            place = self._step(place, key)
        return place

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Yield every key of the specification, as a path."""
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
        # Where the user chooses the keys, one schema holds for all values.
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
        """Return the schemas at `place`, with references and nested choices resolved."""
        return [deep for option in place.options for deep in self._resolve(option)]

    def tag(self, schema: Schema) -> str:
        """Return the constant that names a choice, such as `kfac`; "" when it has none."""
        return next((tag for tag in _tags(schema) if "properties" in schema), "")


def _properties(schema: Schema) -> dict[str, Schema]:
    properties: dict[str, Schema] = schema.get("properties", {})
    return properties


def _items(schema: Schema, index: int) -> list[Schema]:
    """Return the schema of a list's element: its own, or the one that all share."""
    own: list[Schema] = schema.get("prefixItems", [])[index:][:1]
    return own or [schema["items"]] if "items" in schema else own


def _tags(schema: Schema) -> list[str]:
    """Return the tags by which pydantic may call this choice.

    A section is named by a constant among its properties; the others by the `Tag` in job.py and
    optimizers.py.
    """
    if "properties" not in schema:
        return ["constant", "word"]
    if "schedule" in schema["properties"]:
        return ["scheduled"]
    return [inner["const"] for inner in _properties(schema).values() if "const" in inner]
