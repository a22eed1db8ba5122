"""`kfac-dist plan`: what a job needs and how fast it will be, before anything is started."""

from __future__ import annotations

from typing import Any

from kfac_dist._home import data_cache
from kfac_dist.cli.environment import absolute, data_dir, home
from kfac_dist.cli.options import DataDirOption, OutputOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, key_table, make_table, write_result, write_table

_MIB = 2**20


def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    data: DataDirOption = None,
    output: OutputOption = Format.table,
) -> None:
    """Predict a job's processes, memory, layer assignment, times and staleness.

    It measures a few steps on this machine, with one gradient worker's part of a batch. The memory
    leaves out activations, and about 300 MB that each process uses.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])

    from workers.driver.job_plan import job_plan  # imports torch

    found = job_plan(
        job, absolute(spec).parent, data_dir=data_dir(data), cache_dir=data_cache(home())
    )
    if output is Format.table:
        _write_tables(found)
    else:
        write_result(found, output)


def _write_tables(found: dict[str, Any]) -> None:
    columns = ("role", "processes", "CPUs each", "MiB each")
    rows = [
        (
            row["role"],
            row["processes"],
            row["cpus_each"],
            f"{row['memory_bytes_each'] / _MIB:.1f}",
        )
        for row in found["placement"]
    ]
    write_table(make_table(columns, rows, right=columns[1:]))
    if found["layers"]:
        columns = ("layer", "orders", "inverse worker", "seconds an inversion")
        rows = [
            (
                row["layer"],
                " ".join(map(str, row["orders"])),
                row["inverse_worker"],
                f"{row['inversion_seconds']:.3g}",
            )
            for row in found["layers"]
        ]
        write_table(make_table(columns, rows, right=columns[2:]))
    write_table(key_table(found["predicted"]))
