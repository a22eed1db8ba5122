"""`kfac-dist spec schema`: every key that a specification may have."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kfac_dist.cli.output import Format, make_table, write_result, write_table

spec_app = typer.Typer(name="spec", help="Show what a job specification may contain.")


@spec_app.callback()
def _spec() -> None:
    """Show what a job specification may contain."""  # without a callback, `schema` has no name


@spec_app.command()
def schema(
    output: Annotated[
        Format,
        typer.Option("-o", "--output", help="A JSON Schema as json or yaml, or a table of keys."),
    ] = Format.json,
) -> None:
    """Print the JSON Schema of a job specification, or a table of its keys."""
    from kfac_dist.config import job_keys, job_schema

    if output is Format.json:  # indented, unlike results: people keep and read this document
        sys.stdout.write(json.dumps(job_schema(), indent=2, ensure_ascii=False) + "\n")
    elif output is Format.yaml:
        write_result(job_schema(), output)
    else:
        rows = [
            (f"{key.path} ({key.choice})" if key.choice else key.path, *key[2:])
            for key in job_keys()
        ]
        write_table(make_table(("key", "value", "default", "meaning"), rows, right=()))
