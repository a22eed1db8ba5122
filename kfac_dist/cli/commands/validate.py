"""`kfac-dist validate`: check a specification without training."""

from __future__ import annotations

from kfac_dist._home import data_cache
from kfac_dist.cli.environment import absolute, home
from kfac_dist.cli.options import OutputOption, SetOption, SpecArgument
from kfac_dist.cli.output import Format, make_table, write_result


def validate(
    spec: SpecArgument, overrides: SetOption = None, output: OutputOption = Format.table
) -> None:
    """Check a job specification and its task.

    All problems are reported at once. Model and data are not read: `plan` and `train --dry-run`
    check them.
    """
    from kfac_dist.config import load_spec

    job = load_spec(spec, overrides or [])

    from kfac_dist.tasks import load_task  # imports torch, so the specification is checked first

    load_task(job, absolute(spec).parent, cache_dir=data_cache(home()))
    row = (job.name, job.task, job.optimizer.name, job.steps)
    table = make_table(("valid", "task", "optimizer", "steps"), [row], right=("steps",))
    write_result({"valid": True, "spec": job.model_dump(mode="json")}, output, table)
