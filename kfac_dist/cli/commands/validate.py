"""`kfac-dist validate`: check a specification and its task without training."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_dist._home import data_cache
from kfac_dist.cli.environment import absolute, data_folder, home
from kfac_dist.cli.options import DataDirOption, OutputOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, make_table, write_result

_NOT_CHECKED = "a training step, and whether the workers fit (plan does both)"
_NOT_CHECKED_EITHER = "the task, its model and its data (leave --spec-only out)"


def validate(
    spec: SpecArgument,
    overrides: SetOption = None,
    data: DataDirOption = None,
    spec_only: Annotated[
        bool,
        typer.Option("--spec-only", help="Check only the keys and values of the specification."),
    ] = False,
    output: OutputOption = Format.table,
) -> None:
    """Check a job specification, its task, its model and its data.

    All problems of the specification are reported at once. Then the task is loaded, the model is
    built and run on the first cases, and as many cases are read as fit in a few seconds.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])
    not_checked = [_NOT_CHECKED]
    if spec_only:
        not_checked.insert(0, _NOT_CHECKED_EITHER)
    else:
        from workers.driver.preparation import prepare  # imports torch

        base_dir = absolute(spec).parent
        ready = prepare(
            job, base_dir=base_dir, data_dir=data_folder(data), cache_dir=data_cache(home())
        )
        not_checked += ready.check_data()
    row = (job.name, job.task, job.optimizer.name, job.steps)
    table = make_table(("valid", "task", "optimizer", "steps"), [row], right=("steps",))
    result = {"valid": True, "spec": job.model_dump(mode="json"), "not_checked": not_checked}
    write_result(result, output, table)
    if output is Format.table:
        typer.echo("not checked: " + "; ".join(not_checked), err=True)
