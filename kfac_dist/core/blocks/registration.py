"""Which parameters belong to which curvature block (algorithm.md section 12).

Every trainable parameter is in exactly one block or, where its matrix is split, in several parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.block import BlockKind, LayerBlock
from kfac_dist.core.blocks.layer_rules import is_convolution, is_norm
from kfac_dist.core.blocks.registration_report import ReportRow, report_rows
from kfac_dist.core.blocks.sites import Shape, Site, WeightSharing, cut
from kfac_dist.core.blocks.uses import Use, common_use, find_uses
from kfac_dist.core.factors import Link
from kfac_dist.core.vector import trainable_parameters
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True, kw_only=True)
class Registration:
    """All blocks of a model, in the order of its parameters, and the report on these."""

    sites: tuple[Site, ...]
    weight_sharing: WeightSharing
    report: tuple[ReportRow, ...]
    num_parameters: int

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
        """The chain that a block-tridiagonal inverse treats the Linear layers as.

        Layers of other kinds between them are passed over; those that are split or share their
        weight are in no link.
        """
        chain = [site.blocks[0].name for site in self.sites if _is_whole_linear(site)]
        return tuple(Link(*names) for names in pairwise(chain))


def _is_whole_linear(site: Site) -> bool:
    return (
        site.kind == "kronecker"
        and site.has_weight
        and len(site.blocks) == len(site.modules) == 1
        and isinstance(site.modules[0], nn.Linear)
    )


def register(model: nn.Module, settings: KFACSpec) -> Registration:
    """Find the block of every trainable parameter of `model`.

    Raises:
        InvalidSpecError: nothing is trainable, or an option does not fit the model.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise InvalidSpecError("the model has no trainable parameters")
    finder = _SiteFinder(model, settings)
    sites = tuple(site for name in parameters for site in finder.sites_of(name))
    return Registration(
        sites=sites,
        weight_sharing=settings.weight_sharing,
        report=tuple(report_rows(model, sites)),
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
    )


class _SiteFinder:
    """Gives each parameter its sites, once."""

    def __init__(self, model: nn.Module, settings: KFACSpec) -> None:
        self._settings = settings
        self._parameters = trainable_parameters(model)
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._uses = find_uses(model, settings.diagonal)
        self._taken: set[str] = set()
        self._offsets: dict[str, int] = {}
        total = 0
        for name, parameter in self._parameters.items():
            self._offsets[name] = total
            total += parameter.numel()

    def sites_of(self, name: str) -> list[Site]:
        """Return the sites of a parameter, with its partner's, unless an earlier one had them."""
        if name in self._taken:
            return []
        parameter = self._parameters[name]
        use = common_use(self._uses[parameter])
        if isinstance(use, str):
            return [self._diagonal(name, use)]
        partner = self._partner(parameter, use)
        roles = {use.role: name}
        if partner is not None:
            roles["bias" if use.role == "weight" else "weight"] = partner
        self._taken.update(roles.values())
        return list(self._observed(use, roles))

    def _partner(self, parameter: nn.Parameter, use: Use) -> str | None:
        """Return the bias of a weight, or its weight, if they have the same uses."""
        other = getattr(use.module, "bias" if use.role == "weight" else "weight", None)
        if other not in self._names:
            return None
        alike = common_use(self._uses[other])
        own, others = ([u.owner for u in self._uses[p]] for p in (parameter, other))
        return self._names[other] if isinstance(alike, Use) and own == others else None

    def _diagonal(self, name: str, why: str) -> Site:
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
            has_weight=True,
            has_bias=False,
            blocks=(shape.block((0, shape.outputs), (0, 1), whole=True),),
            why=why,
        )

    def _observed(self, use: Use, roles: dict[str, str]) -> Iterator[Site]:
        parameter = self._parameters[next(iter(roles.values()))]
        uses = self._uses[parameter]
        shape = self._shape(use, roles)
        groups = getattr(use.module, "groups", 1)
        grouped = groups > 1 and shape.kind == "kronecker" and "weight" in roles
        for group, rows in enumerate(cut((0, shape.outputs), None, groups if grouped else 1)):
            yield Site(
                kind=shape.kind,
                parameters=tuple(roles[role] for role in ("weight", "bias") if role in roles),
                owners=tuple(u.owner for u in uses),
                modules=tuple(u.module for u in uses),
                has_weight=shape.weight is not None,
                has_bias=shape.bias is not None,
                blocks=tuple(self._blocks(shape, rows, uses)),
                group=group if grouped else None,
            )

    def _shape(self, use: Use, roles: dict[str, str]) -> Shape:
        assert use.kind is not None
        weight, bias = (roles.get(role) for role in ("weight", "bias"))
        embedding = issubclass(use.kind, nn.Embedding)
        like = self._parameters[weight or bias or ""]
        outputs = like.shape[1] if embedding else like.shape[0]
        unit_wise = is_norm(use.module)
        if unit_wise:
            outputs = like.numel()
        elif is_convolution(use.module) and weight is not None:
            unit_wise = use.module.groups == outputs > 1
        kind: BlockKind = (
            "unit-wise" if unit_wise else "kronecker, diagonal A" if embedding else "kronecker"
        )
        return Shape(
            name=(use.owner if weight is not None else bias) or "",
            kind=kind,
            outputs=outputs,
            features=like.numel() // outputs,
            weight=None if weight is None else self._offsets[weight],
            bias=None if bias is None else self._offsets[bias],
            transposed=embedding,
        )

    def _blocks(self, shape: Shape, rows: tuple[int, int], uses: list[Use]) -> Iterator[LayerBlock]:
        """Cut the rows of one site into blocks: fused outputs apart, none wider than allowed."""
        columns = (0, shape.num_columns)
        if shape.kind == "unit-wise":
            yield shape.block(rows, columns, whole=True)
            return
        limit = self._settings.largest_factor
        all_rows = cut(rows, limit, self._num_fused(rows[1] - rows[0], uses))
        diagonal = shape.kind == "kronecker, diagonal A"
        all_columns = cut(columns, None if diagonal else limit)
        whole = all_rows == [(0, shape.outputs)] and len(all_columns) == 1
        for some_rows in all_rows:
            for some_columns in all_columns:
                yield shape.block(some_rows, some_columns, whole=whole)

    def _num_fused(self, outputs: int, uses: list[Use]) -> int:
        for pattern, count in self._settings.fused_outputs.items():
            for use in uses:
                if use.kind is not nn.Linear or not fnmatchcase(use.owner, pattern):
                    continue
                if outputs % count:
                    raise InvalidSpecError(
                        f"fused_outputs: {pattern} says that {use.owner} has {count} equal parts; "
                        f"it has {outputs} outputs, which is no multiple of {count}"
                    )
                return count
        return 1
