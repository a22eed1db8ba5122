"""`kfac-dist plan`: what a job would take, before anything is started."""

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
    """Show processes, memory, the assignment of layers, and predicted times and staleness.

    A few steps are measured on this machine, with one gradient worker's part of a batch; memory is
    without activations and without some 300 MB that each process takes.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])

    from workers.driver.job_plan import job_plan  # takes torch along

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
