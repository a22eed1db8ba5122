"""The schema and the table of keys agree with the models they describe."""

from __future__ import annotations

from kfac_dist.config import JobSpec, job_keys, job_schema
from kfac_dist.config.schema import SchemaMap


def _sections() -> set[str]:
    return {name for name, schema in job_schema()["$defs"].items() if "properties" in schema}


def test_every_key_is_described() -> None:
    schema = job_schema()
    sections = [schema, *(schema["$defs"][name] for name in _sections())]
    assert len(sections) > 10
    for section in sections:
        assert section["additionalProperties"] is False
        for name, key in section["properties"].items():
            # A section is described where it is defined.
            assert "$ref" in key or key.get("description"), f"{section['title']}.{name}"


def test_the_table_has_every_key_once_a_choice() -> None:
    keys = list(job_keys())
    names = [(key.path, key.choice) for key in keys]
    assert len(set(names)) == len(names)
    assert {".".join(path) for path in SchemaMap(JobSpec).paths()} >= {key.path for key in keys}
    optimizers = {"kfac", "sgd", "adam"}
    scheduled = {f"{name}, scheduled" for name in optimizers}
    assert {key.choice for key in keys} == {"", "scheduled", *optimizers, *scheduled}
    assert {key.path for key in keys if key.default == "(required)"} >= {"name", "task", "steps"}
