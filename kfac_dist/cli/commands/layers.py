"""`kfac-dist layers`: each parameter's curvature block, with its size and cost."""

from __future__ import annotations

from kfac_dist._home import data_cache
from kfac_dist.cli.environment import absolute, data_folder, home
from kfac_dist.cli.options import DataDirOption, OutputOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, make_table, write_result

_COLUMNS = (
    "parameter",
    "module",
    "kind",
    "block",
    "num_blocks",
    "dim_A",
    "dim_G",
    "num_parameters",
    "cost",
    "why",
)
_NUMBERS = ("num_blocks", "dim_A", "dim_G", "num_parameters", "cost")


def layers(
    spec: SpecArgument,
    overrides: SetOption = None,
    data: DataDirOption = None,
    output: OutputOption = Format.table,
) -> None:
    """List each parameter with its block, factor sizes and cost.

    The cost of a block is dim_A^3 + dim_G^3, for one refresh of its inverse. The total counts only
    trained parameters.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])

    from workers.api import layers_report

    rows = layers_report(
        job, absolute(spec).parent, data_dir=data_folder(data), cache_dir=data_cache(home())
    )
    total = sum(row["num_parameters"] for row in rows if row["block"] != "frozen")
    lines = [[row[column] for column in _COLUMNS] for row in rows]
    lines.append(["total", "", "", "", "", "", "", total, "", ""])
    table = make_table(_COLUMNS, lines, right=_NUMBERS)
    write_result({"num_parameters": total, "layers": list(rows)}, output, table)
