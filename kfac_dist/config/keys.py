"""All keys of a specification, for the reference table of `kfac-dist spec schema`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kfac_dist.config.job import JobSpec
from kfac_dist.config.problems import expected, show
from kfac_dist.config.schema import Place, Schema, SchemaMap

_NO_DEFAULT = "(required)"


class Key(NamedTuple):
    """One key: its path, the values it accepts, its default as JSON, and what it means.

    `choice` is the kind of section that has the key, such as `sgd`, or `sgd, scheduled` for a key
    of a schedule inside; "" when there is only one kind.
    """

    path: str
    choice: str
    expected: str
    default: str
    description: str


def job_keys() -> Iterator[Key]:
    """Yield every key with a value rather than a section, in the order of the specification."""
    schema = SchemaMap(JobSpec)
    yield from _below(schema, schema.locate(()), choice="")


def _below(schema: SchemaMap, place: Place, choice: str) -> Iterator[Key]:
    options = schema.options(place)
    for option in options:
        sections = [inner for inner in options if "properties" in inner]
        own = schema.tag(option) if len(sections) > 1 or len(options) > len(sections) > 0 else ""
        within = ", ".join(filter(None, (choice, own)))
        for name, inner in option.get("properties", {}).items():
            here = Place((*place.path, name), (inner,), ())
            if not _is_section(schema, here):
                yield _key(schema, here, inner, within, option)
            yield from _below(schema, here, within)


def _is_section(schema: SchemaMap, place: Place) -> bool:
    return all("properties" in option for option in schema.options(place))


def _key(schema: SchemaMap, place: Place, inner: Schema, choice: str, section: Schema) -> Key:
    required = place.path[-1] in section.get("required", ())
    empty: object = {} if inner.get("type") == "object" else None
    return Key(
        path=".".join(place.path),
        choice=choice,
        expected=expected(schema, place),
        default=_NO_DEFAULT if required else show(inner.get("default", empty)),
        description=inner.get("description", ""),
    )
