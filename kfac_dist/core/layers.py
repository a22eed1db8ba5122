"""Which parameters belong to which curvature block.

A block covers one layer: `s = W abar`, abar the input with a 1 appended when there is a bias, so
its weight matrix is [dim_G, dim_A] with the bias as last column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.factors import Link
from kfac_dist.core.vector import trainable_parameters
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True, kw_only=True)
class LayerBlock:
    """One Kronecker-factored block and where its parameters lie in the parameter vector."""

    name: str
    module: nn.Linear
    weight_offset: int
    bias_offset: int | None

    @property
    def dim_A(self) -> int:
        """Order of A: the inputs, and 1 for the bias."""
        return self.module.in_features + (self.bias_offset is not None)

    @property
    def dim_G(self) -> int:
        """Order of G: the outputs."""
        return self.module.out_features

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of the matrices that are inverted for this block."""
        return self.dim_A, self.dim_G

    def matrix(self, vector: Tensor) -> Tensor:
        """Return this layer's part of `vector` [P] as a matrix [dim_G, dim_A]."""
        outputs, inputs = self.module.out_features, self.module.in_features
        start = self.weight_offset
        weight = vector[start : start + outputs * inputs].view(outputs, inputs)
        if self.bias_offset is None:
            return weight
        bias = vector[self.bias_offset : self.bias_offset + outputs]
        return torch.cat([weight, bias.unsqueeze(1)], dim=1)

    def write(self, matrix: Tensor, vector: Tensor) -> None:
        """Write `matrix` [dim_G, dim_A] into this layer's part of `vector` [P], in place."""
        outputs, inputs = self.module.out_features, self.module.in_features
        start = self.weight_offset
        vector[start : start + outputs * inputs].view(outputs, inputs).copy_(matrix[:, :inputs])
        if self.bias_offset is not None:
            vector[self.bias_offset : self.bias_offset + outputs].copy_(matrix[:, inputs])


class ReportRow(NamedTuple):
    """One trainable parameter in the registration report.

    `cost` is the number of multiplications of one refresh of its block's inverses, up to a
    constant: dim_A^3 + dim_G^3. It stands at the weight; the bias shares the block.
    """

    parameter: str
    module: str
    kind: str
    block: str
    dim_A: int
    dim_G: int
    num_parameters: int
    cost: int


@dataclass(frozen=True, kw_only=True)
class Registration:
    """All blocks of a model, in the order of its modules, and the report on its parameters."""

    blocks: tuple[LayerBlock, ...]
    report: tuple[ReportRow, ...]
    num_parameters: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(block.name for block in self.blocks)

    @property
    def links(self) -> tuple[Link, ...]:
        """The neighbours of the chain that a block-tridiagonal inverse treats the layers as."""
        return tuple(Link(*names) for names in pairwise(self.names))


def register(model: nn.Module) -> Registration:
    """Find the block of every trainable parameter of `model`.

    Raises:
        InvalidSpecError: a trainable parameter is in no block, or one belongs to two layers.
    """
    offsets = _offsets(model)
    blocks = tuple(_linear_blocks(model, offsets))
    owners: dict[int, str] = {}
    for block in blocks:
        for offset in (block.weight_offset, block.bias_offset):
            if offset is not None and owners.setdefault(offset, block.name) != block.name:
                raise InvalidSpecError(
                    f"layers {owners[offset]!r} and {block.name!r} share a parameter: tied weights "
                    "have no K-FAC block yet; untie them or use optimizer.name: adam"
                )
    left_out = [name for name, offset in offsets.items() if offset not in owners]
    if left_out:
        raise InvalidSpecError(_left_out_message(model, left_out))
    if not blocks:
        raise InvalidSpecError("the model has no trainable parameters")
    parameters = trainable_parameters(model)
    return Registration(
        blocks=blocks,
        report=tuple(_report_rows(blocks, {o: n for n, o in offsets.items()}, parameters)),
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
    )


def _offsets(model: nn.Module) -> dict[str, int]:
    offsets, total = {}, 0
    for name, parameter in trainable_parameters(model).items():
        offsets[name] = total
        total += parameter.numel()
    return offsets


def _linear_blocks(model: nn.Module, offsets: dict[str, int]) -> Iterator[LayerBlock]:
    by_identity = {id(p): offsets[name] for name, p in trainable_parameters(model).items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module.weight) not in by_identity:
            continue
        bias = module.bias
        yield LayerBlock(
            name=name,
            module=module,
            weight_offset=by_identity[id(module.weight)],
            bias_offset=None if bias is None else by_identity.get(id(bias)),
        )


def _left_out_message(model: nn.Module, left_out: Sequence[str]) -> str:
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in left_out}
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    return (
        f"no K-FAC block covers {listed}; Linear layers are covered. "
        "Freeze these parameters or use optimizer.name: adam"
    )


def _report_rows(
    blocks: Sequence[LayerBlock], names: dict[int, str], parameters: dict[str, nn.Parameter]
) -> Iterator[ReportRow]:
    for block in blocks:
        cost = block.dim_A**3 + block.dim_G**3
        for offset in (block.weight_offset, block.bias_offset):
            if offset is None:
                continue
            yield ReportRow(
                parameter=names[offset],
                module=block.name,
                kind=type(block.module).__name__,
                block="kronecker",
                dim_A=block.dim_A,
                dim_G=block.dim_G,
                num_parameters=parameters[names[offset]].numel(),
                cost=cost if offset == block.weight_offset else 0,
            )
