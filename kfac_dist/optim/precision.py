"""The type in which inverses are applied: as it is set, or as a measurement decides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.errors import InvalidSpecError

_NUM_LARGEST = 2  # layers
# Orders that wide layers are cut to, so that the measurement takes tenths of a second. Emulated
# bfloat16 is tens of times slower than float32, which the first, small order shows at once.
_ORDERS = (192, 1024)
_HOPELESS = 0.25
_WORTHWHILE = 1.2  # repeated measurements differ by less
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class PreconditionDtype:
    """The type in which inverses are applied, and why."""

    dtype: Literal["float32", "bfloat16"]
    reason: str

    def __str__(self) -> str:
        """Return the choice as a line of a log."""
        return f"inverses are applied in {self.dtype}: {self.reason}"

    def resolve(self, settings: KFACSpec) -> KFACSpec:
        """Return the settings with this type as their `precondition_dtype`."""
        return settings.model_copy(update={"precondition_dtype": self.dtype})


def choose_precondition_dtype(
    settings: KFACSpec, blocks: Sequence[LayerBlock], like: Tensor
) -> PreconditionDtype:
    """Choose the type for parameters of the type and on the device of `like`.

    `auto` is measured if the parameters are float32 and a layer has two dense factors; otherwise
    the type of the parameters is kept.

    Raises:
        InvalidSpecError: the setting is bfloat16, and the parameters are not float32.
    """
    wanted = settings.precondition_dtype
    if wanted == "bfloat16" and like.dtype != torch.float32:
        raise InvalidSpecError(
            f"precondition_dtype: bfloat16 needs parameters in float32; these are {like.dtype}"
        )
    if wanted != "auto":
        return PreconditionDtype(dtype=wanted, reason="as the specification says")
    if like.dtype != torch.float32:
        return PreconditionDtype(dtype="float32", reason=f"the parameters are {like.dtype}")
    dense = [block for block in blocks if block.kind == "kronecker"]
    if not dense:
        return PreconditionDtype(dtype="float32", reason="no layer has two dense factors")
    return _measure(dense, like)


def _measure(blocks: Sequence[LayerBlock], like: Tensor) -> PreconditionDtype:
    largest = sorted(blocks, key=lambda b: b.dim_G * b.dim_A * (b.dim_G + b.dim_A))[-_NUM_LARGEST:]
    for most in _ORDERS:
        sizes = [(min(block.dim_G, most), min(block.dim_A, most)) for block in largest]
        speedup = _speedup([like.new_ones(size) for size in sizes])
        if speedup < _HOPELESS:
            break
    products = " and ".join(f"{dim_G} x {dim_A}" for dim_G, dim_A in sizes)
    return PreconditionDtype(
        dtype="bfloat16" if speedup >= _WORTHWHILE else "float32",
        reason=f"bfloat16 takes {1 / speedup:.2g} times as long as float32 on {like.device.type} "
        f"(products with {products})",
    )


def _speedup(matrices: Sequence[Tensor]) -> float:
    exact = [KroneckerPair(A=m.T @ m, G=m @ m.T) for m in matrices]
    rounded = [pair.map_matrices(lambda factor: factor.to(torch.bfloat16)) for pair in exact]
    return _seconds(exact, matrices) / _seconds(rounded, matrices)


def _seconds(pairs: Sequence[KroneckerPair], matrices: Sequence[Tensor]) -> float:
    """Return the shortest of a few measured times to apply `pairs`, in seconds."""
    return min(_time(pairs, matrices) for _ in range(_REPEATS))


def _time(pairs: Sequence[KroneckerPair], matrices: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    for pair, matrix in zip(pairs, matrices, strict=True):
        pair.apply(matrix)
    if matrices[0].is_cuda:
        torch.cuda.synchronize(matrices[0].device)
    return time.perf_counter() - started
