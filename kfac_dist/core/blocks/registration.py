"""Which parameters belong to which curvature block (docs/algorithm.md#layers).

Every trainable parameter is in exactly one block, or in several if its matrix is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.block import LayerBlock, Range
from kfac_dist.core.blocks.registration_report import ReportRow, report_rows
from kfac_dist.core.blocks.sites import Shape, Site, WeightSharing, cut
from kfac_dist.core.blocks.uses import Use, common_use, find_uses
from kfac_dist.core.factors import Link
from kfac_dist.core.passes.own_passes import own_passes
from kfac_dist.core.vector import trainable_parameters
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True, kw_only=True)
class Registration:
    """All blocks of a model in the order of its parameters, and the report on them.

    `least_cases` is the number of cases that a pass needs: two with batch normalisation.
    """

    sites: tuple[Site, ...]
    weight_sharing: WeightSharing
    report: tuple[ReportRow, ...]
    num_parameters: int
    least_cases: int = 1

    @property
    def blocks(self) -> tuple[LayerBlock, ...]:
        """The blocks of all sites."""
        return tuple(block for site in self.sites for block in site.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(block.name for block in self.blocks)

    @property
    def links(self) -> tuple[Link, ...]:
        """The links of the chain that a block-tridiagonal inverse makes of the linear layers.

        The chain skips layers of other kinds, and linear layers that are split or share their
        weight: their neighbours on both sides are linked with each other.
        """
        chain = [site.blocks[0].name for site in self.sites if site.is_whole_linear_layer]
        return tuple(Link(*names) for names in pairwise(chain))


def register(model: nn.Module, settings: KFACSpec) -> Registration:
    """Find the block of every trainable parameter of `model`.

    Raises:
        InvalidSpecError: nothing is trainable, a parameter has no elements or no shape yet, or an
            option does not fit the model.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise InvalidSpecError("the model has no trainable parameters")
    _check_shapes(parameters)
    # Reading a weight that is computed from another (spectral norm) can change buffers.
    with own_passes(model):
        finder = _SiteFinder(model, settings)
        sites = tuple(site for name in parameters for site in finder.new_sites(name))
    return Registration(
        sites=sites,
        weight_sharing=settings.weight_sharing,
        report=tuple(report_rows(model, sites)),
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        least_cases=2 if any(isinstance(m, _BatchNorm) for m in model.modules()) else 1,
    )


def _check_shapes(parameters: Mapping[str, nn.Parameter]) -> None:
    lazy = [name for name, p in parameters.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise InvalidSpecError(
            f"{', '.join(lazy)}: these parameters have no shape before the model's first pass; run "
            "it on one batch first"
        )
    empty = [f"{name} {tuple(p.shape)}" for name, p in parameters.items() if p.numel() == 0]
    if empty:
        raise InvalidSpecError(
            f"{', '.join(empty)}: a parameter must have at least one element; remove it, or freeze "
            "it with requires_grad_(False)"
        )


class _SiteFinder:
    """Gives each parameter its sites, once."""

    def __init__(self, model: nn.Module, settings: KFACSpec) -> None:
        self._settings = settings
        self._parameters = trainable_parameters(model)
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._uses = find_uses(model, settings.diagonal)
        self._done: set[str] = set()
        self._offsets: dict[str, int] = {}
        total = 0
        for name, parameter in self._parameters.items():
            self._offsets[name] = total
            total += parameter.numel()

    def new_sites(self, name: str) -> list[Site]:
        """Return the sites of a parameter and its partner, unless its partner's had it already."""
        if name in self._done:
            return []
        parameter = self._parameters[name]
        use = common_use(self._uses[parameter])
        if isinstance(use, str):
            return [self._diagonal_site(name, use)]
        partner = self._partner(parameter, use)
        roles = {use.role: name}
        if partner is not None:
            roles["bias" if use.role == "weight" else "weight"] = partner
        self._done.update(roles.values())
        return list(self._observed_sites(use, roles))

    def _partner(self, parameter: nn.Parameter, use: Use) -> str | None:
        """Return the bias of a weight, or the weight of a bias, if both have the same uses.

        A weight whose uses have different biases has no homogeneous coordinate in common.
        """
        other = getattr(use.module, "bias" if use.role == "weight" else "weight", None)
        if other not in self._names:
            return None
        alike = common_use(self._uses[other])
        own, others = ([u.owner for u in self._uses[p]] for p in (parameter, other))
        return self._names[other] if isinstance(alike, Use) and own == others else None

    def _diagonal_site(self, name: str, why: str) -> Site:
        parameter = self._parameters[name]
        shape = Shape(
            name=name,
            kind="diagonal",
            outputs=parameter.numel(),
            features=1,
            weight=self._offsets[name],
            bias=None,
        )
        return Site(
            kind="diagonal",
            parameters=(name,),
            owners=tuple(use.owner for use in self._uses[parameter]),
            modules=(),
            rule=None,
            has_weight=True,
            has_bias=False,
            blocks=(shape.block((0, shape.outputs), (0, 1), whole=True),),
            why=why,
        )

    def _observed_sites(self, use: Use, roles: dict[str, str]) -> Iterator[Site]:
        """Yield the site of parameters that a rule covers, or one for each group of channels."""
        parameter = self._parameters[next(iter(roles.values()))]
        uses = self._uses[parameter]
        shape = self._shape(use, roles)
        assert use.rule is not None
        has_groups = shape.kind == "kronecker" and shape.weight is not None
        num_groups = use.rule.num_groups(use.module) if has_groups else 1
        for group, rows in enumerate(cut((0, shape.outputs), None, num_groups)):
            yield Site(
                kind=shape.kind,
                parameters=tuple(roles[role] for role in ("weight", "bias") if role in roles),
                owners=tuple(u.owner for u in uses),
                modules=tuple(u.module for u in uses),
                rule=use.rule,
                has_weight=shape.weight is not None,
                has_bias=shape.bias is not None,
                blocks=tuple(self._blocks(shape, rows, uses)),
                group=group if num_groups > 1 else None,
            )

    def _shape(self, use: Use, roles: dict[str, str]) -> Shape:
        assert use.rule is not None
        weight, bias = (roles.get(role) for role in ("weight", "bias"))
        parameter = self._parameters[weight or bias or ""]
        outputs = use.rule.num_outputs(parameter)
        return Shape(
            name=(use.owner if weight is not None else bias) or "",
            kind=use.rule.block_kind(use.module, has_weight=weight is not None),
            outputs=outputs,
            features=parameter.numel() // outputs,
            weight=None if weight is None else self._offsets[weight],
            bias=None if bias is None else self._offsets[bias],
            transposed=use.rule.transposed,
        )

    def _blocks(self, shape: Shape, rows: Range, uses: Sequence[Use]) -> Iterator[LayerBlock]:
        """Cut the rows of one site into blocks: fused outputs apart, none wider than allowed."""
        columns = (0, shape.num_columns)
        if shape.kind == "unit-wise":
            yield shape.block(rows, columns, whole=True)
            return
        limit = self._settings.largest_factor
        all_rows = cut(rows, limit, self._num_fused(rows[1] - rows[0], uses))
        # A diagonal A needs no inversion, so a wide one is not split.
        diagonal = shape.kind == "kronecker, diagonal A"
        all_columns = cut(columns, None if diagonal else limit)
        whole = all_rows == [(0, shape.outputs)] and len(all_columns) == 1
        for some_rows in all_rows:
            for some_columns in all_columns:
                yield shape.block(some_rows, some_columns, whole=whole)

    def _num_fused(self, outputs: int, uses: Sequence[Use]) -> int:
        """Return the number of equal parts that `fused_outputs` gives to a linear layer."""
        for pattern, count in self._settings.fused_outputs.items():
            for use in uses:
                is_linear = use.rule is not None and use.rule.is_linear
                if not is_linear or not fnmatchcase(use.owner, pattern):
                    continue
                if outputs % count:
                    raise InvalidSpecError(
                        f"fused_outputs: {pattern} says that {use.owner} has {count} equal parts, "
                        f"but its {outputs} outputs are not a multiple of {count}"
                    )
                return count
        return 1
