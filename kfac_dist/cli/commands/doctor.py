"""`kfac-dist doctor`: checks whether this machine has what jobs need."""

from __future__ import annotations

import typer

from kfac_dist.cli.doctor_checks import all_checks
from kfac_dist.cli.environment import data_folder, home
from kfac_dist.cli.options import DataDirOption, OutputOption
from kfac_dist.cli.output import Format, make_table, write_result


def doctor(data: DataDirOption = None, output: OutputOption = Format.table) -> None:
    """Check whether this machine has what jobs need.

    It checks Python, packages, memory, data sets and folders, and exits with 1 when something that
    every job needs is broken.
    """
    checks = list(all_checks(home(), data_folder(data)))
    rows = [(check.status, check.name, check.found, check.advice) for check in checks]
    broken = any(check.status == "broken" for check in checks)
    write_result(
        {"ok": not broken, "checks": [check._asdict() for check in checks]},
        output,
        make_table(("status", "check", "found", "advice"), rows, right=()),
    )
    if broken:
        raise typer.Exit(1)
