"""The registration report: which block each parameter of a model has, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from kfac_dist.core.blocks.sites import Site


class ReportRow(NamedTuple):
    """One parameter in the registration report.

    `module` names the modules that use it, and `kind` is the class of the first of them. `block`
    is the kind of its blocks, or "frozen" if it is not trained; `why` is the reason for a diagonal
    block.

    `dim_A` and `dim_G` are the largest of its `num_blocks` blocks. For blocks without factors,
    they are the number of parameters of a unit and the number of units.

    `cost` is the number of multiplications that one refresh of the inverses takes, up to a
    constant. A weight and its bias share their blocks, whose cost is in the row of the weight.
    """

    parameter: str
    module: str
    kind: str
    block: str
    num_blocks: int
    dim_A: int
    dim_G: int
    num_parameters: int
    cost: int
    why: str


def report_rows(model: nn.Module, sites: Sequence[Site]) -> Iterator[ReportRow]:
    """Yield a row for each parameter of `model`, trained or frozen, in the model's order."""
    by_parameter: dict[str, list[Site]] = {}
    for site in sites:
        for name in site.parameters:
            by_parameter.setdefault(name, []).append(site)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name in by_parameter:
            yield _row(model, name, parameter.numel(), by_parameter[name])
        else:
            kind = type(model.get_submodule(owner)).__name__
            yield ReportRow(name, owner, kind, "frozen", 0, 0, 0, parameter.numel(), 0, "")


def _row(model: nn.Module, name: str, num_parameters: int, sites: Sequence[Site]) -> ReportRow:
    blocks = [block for site in sites for block in site.blocks]
    first = sites[0]
    return ReportRow(
        parameter=name,
        module=", ".join(first.owners),
        kind=type(model.get_submodule(first.owners[0])).__name__,
        block=first.kind,
        num_blocks=len(blocks),
        dim_A=max(block.dim_A for block in blocks),
        dim_G=max(block.dim_G for block in blocks),
        num_parameters=num_parameters,
        cost=sum(block.cost for block in blocks) if name == first.parameters[0] else 0,
        why=first.why,
    )
