"""Whether the factors of a model fit into memory, before the first step asks for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.blocks.sites import Site
from kfac_dist.errors import InvalidSpecError

_LOG = logging.getLogger(__name__)
_COPIES = 2  # of factors: the sums of a batch, and the averages
_WARN_ABOVE = 0.5  # of the memory
_NAMED = 3  # layers
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class LayerMemory(NamedTuple):
    """What the blocks of one site need: the orders of the largest one, and all bytes together."""

    layer: str
    dim_A: int
    dim_G: int
    num_bytes: int

    def __str__(self) -> str:
        """Return the layer with its sizes."""
        size = _gib(self.num_bytes)
        return f"{self.layer} (A of order {self.dim_A}, G of order {self.dim_G}: {size})"


def layer_memory(registration: Registration, element_bytes: int) -> list[LayerMemory]:
    """Return the least memory of factors, averages and inverses of each site, largest first."""
    found = [_site_memory(site, element_bytes) for site in registration.sites]
    return sorted(found, key=lambda layer: -layer.num_bytes)


def _site_memory(site: Site, element_bytes: int) -> LayerMemory:
    # Blocks with the same columns share A, and blocks with the same rows share G.
    inputs = {block.columns: _elements(block)["A"] for block in site.blocks}
    outputs = {block.rows: _elements(block)["G"] for block in site.blocks}
    factors = sum(inputs.values()) + sum(outputs.values())
    inverses = sum(sum(_elements(block).values()) for block in site.blocks)
    return LayerMemory(
        layer=site.blocks[0].name.partition("[")[0],
        dim_A=max(block.dim_A for block in site.blocks),
        dim_G=max(block.dim_G for block in site.blocks),
        num_bytes=(_COPIES * factors + inverses) * element_bytes,
    )


def _elements(block: LayerBlock) -> Mapping[str, int]:
    if block.kind == "kronecker":
        return {"A": block.dim_A**2, "G": block.dim_G**2}
    if block.kind == "kronecker, diagonal A":
        return {"A": block.dim_A, "G": block.dim_G**2}
    return {"A": 0, "G": block.dim_G * block.dim_A**2}


def check_factor_memory(
    registration: Registration, like: Tensor, *, memory_bytes: int | None = None
) -> None:
    """Check that the factors fit into the memory of a device, and warn if they need half of it.

    Args:
        registration: the blocks of the model.
        like: a tensor with the type and on the device of the parameters.
        memory_bytes: the memory of this device, found out if None.

    Raises:
        InvalidSpecError: they do not fit.
    """
    available = device_memory(like.device) if memory_bytes is None else memory_bytes
    layers = layer_memory(registration, like.element_size())
    needed = sum(layer.num_bytes for layer in layers)
    if needed <= _WARN_ABOVE * available:
        return
    message = (
        f"the factors, their averages and their inverses need at least {_gib(needed)} of the "
        f"{_gib(available)} of memory; the largest: "
        f"{', '.join(map(str, layers[:_NAMED]))}. Split wide factors with max_factor_dim: auto, "
        "which for inverse: block_tridiagonal must be a number, or ask for a diagonal block with "
        f"diagonal: [{layers[0].layer}]"
    )
    if needed > available:
        raise InvalidSpecError(message)
    _LOG.warning("%s", message)


def device_memory(device: torch.device) -> int:
    """Return the memory in bytes of a GPU, or what a process on this machine may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
