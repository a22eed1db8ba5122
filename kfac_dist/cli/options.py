"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfac_dist.cli.output import Format

SpecArgument = Annotated[
    Path, typer.Argument(metavar="SPEC", help="The job specification: a YAML or TOML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, as in optimizer.damping.initial=30; the value is YAML. Repeatable.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Where data sets are; else $KFAC_DIST_DATA, the cache, a download.",
    ),
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Serve Prometheus metrics on this port while the job runs, to this machine only "
        "(127.0.0.1); 0 takes a free one and says which.",
    ),
]
OutputOption = Annotated[
    Format, typer.Option("-o", "--output", help="How the result is written to stdout.")
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE; else $KFAC_DIST_STORE, "
        "else store.db in $KFAC_DIST_HOME. A password is better in a ~/.pgpass file.",
    ),
]
