"""The options and arguments that several commands share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfac_dist.cli.output import Format

SpecArgument = Annotated[
    Path, typer.Argument(metavar="SPEC", help="The job specification, a YAML or TOML file.")
]
JobArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The job's id, as kfac-dist list shows it.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the specification, for example optimizer.damping.initial=30. The "
        "value is YAML. Repeatable.",
    ),
]
DataDirOption = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder of data sets, or the URL of one, which is fetched into the cache. Default: "
        "$KFAC_DIST_DATA, else the cache, else a download.",
    ),
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Serve Prometheus metrics on this port of 127.0.0.1 while the job runs; 0 picks a "
        "free port and prints it.",
    ),
]
OutputOption = Annotated[
    Format, typer.Option("-o", "--output", help="Format of the result on stdout.")
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDRESS",
        help="The server, as HOST:PORT, or grpcs://HOST:PORT for TLS. Default: "
        "$KFAC_DIST_SERVER, else the server on this machine.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        help="PEM file of the authority that signed the server's certificate. Default: "
        "$KFAC_DIST_CA, else the system's authorities.",
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The server's database: sqlite:///FILE or postgresql+psycopg://HOST/DB. Default: "
        "$KFAC_DIST_STORE, else store.db in $KFAC_DIST_HOME. Keep passwords in ~/.pgpass.",
    ),
]
