"""`kfac-dist plan`: what a job needs and how fast it will be, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from kfac_dist._home import data_cache
from kfac_dist.cli.environment import absolute, data_folder, home
from kfac_dist.cli.options import DataDirOption, OutputOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, key_table, make_table, write_result, write_table

_MIB = 2**20


def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    data: DataDirOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Predict a job's processes, memory, traffic, layer assignment, times and staleness.

    It measures a few steps on this machine, with one gradient worker's part of a batch. What stands
    beside a role is for each of its processes: shards of the parameter server, memory with Python,
    torch and Ray, what it receives in a step. Times are those of workers that share the
    cores of this machine; what else runs on it now makes them too long.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])

    from workers.driver.job_plan import job_plan  # imports torch

    found = job_plan(
        job, absolute(spec).parent, data_dir=data_folder(data), cache_dir=data_cache(home())
    )
    if output is Format.table:
        _write_tables(found)
    else:
        write_result(found, output)
    for warning in _warnings(found["machine"]):
        typer.echo(f"warning: {warning}", err=True)


def _warnings(machine: dict[str, Any]) -> Iterator[str]:
    cpus, load = machine["cpus"], machine["load"]
    if load > cpus - 0.5:  # less than half a core was free for the measurement
        yield (
            f"this machine was busy (load {load:.1f} on {cpus} CPUs) when the times were measured, "
            "so they are too long"
        )
    needed, available = machine["memory_bytes_needed"], machine["memory_bytes_available"]
    if needed > available:
        yield (
            f"the processes of the job need {needed / _MIB:,.0f} MiB together, and this machine "
            f"has {available / _MIB:,.0f} MiB available"
        )


def _write_tables(found: dict[str, Any]) -> None:
    columns = ("role", "processes", "shards", "CPUs", "GPUs", "MiB", "MiB received a step")
    rows = [
        (
            row["role"],
            row["processes"],
            row["shards_each"],
            row["cpus_each"],
            f"{row['gpus_each']:g}",
            f"{row['memory_bytes_each'] / _MIB:.1f}",
            f"{row['received_bytes_each'] / _MIB:.3g}",
        )
        for row in found["placement"]
    ]
    write_table(make_table(columns, rows, right=columns[1:]))
    if found["layers"]:
        layer_columns = ("layer", "orders", "inverse worker", "seconds an inversion")
        layers = [
            (
                row["layer"],
                " ".join(map(str, row["orders"])),
                row["inverse_worker"],
                f"{row['inversion_seconds']:.3g}",
            )
            for row in found["layers"]
        ]
        write_table(make_table(layer_columns, layers, right=layer_columns[2:]))
    write_table(key_table(found["predicted"]))
