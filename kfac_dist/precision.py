"""In which type the inverses are applied, where the settings leave it to a measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.layers import LayerBlock
from kfac_dist.errors import InvalidSpecError

_NUM_LARGEST = 2  # layers
_LARGEST_ORDER = 1024  # so that the measurement of a wide layer does not take seconds
_REPEATS = 3
# Rounding must pay, beyond what one measurement differs from the next by.
_WORTHWHILE = 1.2
_HOPELESS = 0.5


@dataclass(frozen=True, kw_only=True)
class PreconditionDtype:
    """The type, and a sentence that says why."""

    dtype: Literal["float32", "bfloat16"]
    reason: str

    def resolve(self, settings: KFACSpec) -> KFACSpec:
        """Return the settings with the choice made."""
        return settings.model_copy(update={"precondition_dtype": self.dtype})


def choose_precondition_dtype(
    settings: KFACSpec, blocks: Sequence[LayerBlock], like: Tensor
) -> PreconditionDtype:
    """Choose for parameters of the type and on the device of `like`; `auto` takes a measurement.

    Raises:
        InvalidSpecError: bfloat16 is asked for, and the parameters are not float32.
    """
    wanted = settings.precondition_dtype
    if wanted == "bfloat16" and like.dtype != torch.float32:
        raise InvalidSpecError(
            f"precondition_dtype: bfloat16 needs parameters in float32; these are {like.dtype}"
        )
    if wanted != "auto":
        return PreconditionDtype(dtype=wanted, reason="as the specification says")
    if like.dtype != torch.float32 or not blocks:
        return PreconditionDtype(dtype="float32", reason=f"the parameters are {like.dtype}")
    return _measure(blocks, like)


def _measure(blocks: Sequence[LayerBlock], like: Tensor) -> PreconditionDtype:
    orders = [tuple(min(n, _LARGEST_ORDER) for n in (b.dim_G, b.dim_A)) for b in blocks]
    largest = sorted(orders, key=lambda order: order[0] * order[1] * sum(order))[-_NUM_LARGEST:]
    matrices = [like.new_ones(order) for order in largest]
    exact = [KroneckerPair(A=m.T @ m, G=m @ m.T) for m in matrices]
    rounded = [pair.map_matrices(lambda tensor: tensor.to(torch.bfloat16)) for pair in exact]
    plain_seconds = _seconds(exact, matrices, give_up_after=float("inf"))
    seconds = _seconds(rounded, matrices, give_up_after=plain_seconds / _HOPELESS)
    speedup = plain_seconds / seconds
    sizes = " and ".join(f"{dim_G} x {dim_A}" for dim_G, dim_A in largest)
    return PreconditionDtype(
        dtype="bfloat16" if speedup >= _WORTHWHILE else "float32",
        reason=f"on {like.device.type}, bfloat16 is {speedup:.2g} times as fast as float32 for "
        f"{sizes}; {_WORTHWHILE:g} times is worth the rounding",
    )


def _seconds(
    pairs: Sequence[KroneckerPair], matrices: Sequence[Tensor], give_up_after: float
) -> float:
    """Return the least of a few times to apply `pairs`, or the first beyond `give_up_after`."""
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for pair, matrix in zip(pairs, matrices, strict=True):
            pair.apply(matrix)
        if matrices[0].is_cuda:
            torch.cuda.synchronize(matrices[0].device)
        best = min(best, time.perf_counter() - started)
        if best > give_up_after:
            break
    return best
