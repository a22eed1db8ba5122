"""How the parameters are cut into the shards of the parameter server.

Every process plans it for itself, from the model alone, and finds the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.coordination.steps.sharding import BlockSize, assign_shards, chains_of
from kfac_dist.core.blocks.block import LayerBlock, Part
from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.factors import Link
from workers.exchange.arrays import Array, section, to_array, to_tensor

# A first-order optimizer has no blocks; its parameter vector is cut into pieces of this length.
_PIECE = 1 << 16

# The entries of a server's snapshot that are vectors [P], beside those of torch's optimizers.
_VECTORS = ("parameters", "average:average", "update:previous_update")
_OPTIMIZER = "optimizer:"
_COUNTS = ("count:", "stale_applied")
_INVERSES = "inverse:"


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The layout of each shard's block vector, and the places of its blocks in the model's order.

    There are fewer shards than asked for if there are fewer blocks, or fewer chains of blocks that
    are preconditioned together.
    """

    layouts: tuple[BlockLayout, ...]
    places: tuple[tuple[int, ...], ...]
    num_parameters: int

    def __len__(self) -> int:
        return len(self.layouts)

    def in_model_order(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the rows of all blocks [B, K] in the order of the model, from those by shard."""
        merged = torch.cat(list(rows))
        order = torch.tensor([place for places in self.places for place in places])
        return merged[torch.argsort(order)]

    def whole(self, slices: Sequence[Tensor]) -> Tensor:
        """Return the parameter vector [P] whose blocks are in the block vectors of the shards."""
        vector = slices[0].new_empty(self.num_parameters)
        for layout, values in zip(self.layouts, slices, strict=True):
            layout.scatter(values, vector)
        return vector


def plan_shards(
    registration: Registration | None,
    links: Sequence[Link],
    num_parameters: int,
    num_shards: int,
) -> ShardPlan:
    """Plan the shards of a model.

    Args:
        registration: the blocks of the model; None for a first-order optimizer.
        links: layers that the inverse links are preconditioned together.
        num_parameters: length of the parameter vector.
        num_shards: how many shards to make, at most.
    """
    blocks = registration.blocks if registration else _pieces(num_parameters)
    names = [block.name for block in blocks]
    chains = chains_of(names, [(link.name, link.next_name) for link in links])
    sizes = [
        BlockSize(dim_G=block.dim_G, dim_A=block.dim_A, chain=chains.get(block.name))
        for block in blocks
    ]
    places = assign_shards(sizes, num_shards)
    return ShardPlan(
        layouts=tuple(BlockLayout([blocks[place] for place in own]) for own in places),
        places=places,
        num_parameters=num_parameters,
    )


def _pieces(num_parameters: int) -> tuple[LayerBlock, ...]:
    starts = range(0, num_parameters, _PIECE)
    return tuple(
        _piece(number, start, min(_PIECE, num_parameters - start))
        for number, start in enumerate(starts)
    )


def _piece(number: int, start: int, length: int) -> LayerBlock:
    rows, columns = (0, length), (0, 1)
    part = Part(offset=start, shape=(length, 1), rows=rows, columns=columns)
    return LayerBlock(
        name=f"piece {number}", kind="diagonal", parts=(part,), rows=rows, columns=columns
    )


def _is_vector(name: str, array: Array) -> bool:
    return name in _VECTORS or (name.startswith(_OPTIMIZER) and array.ndim > 0)


def merge_snapshots(plan: ShardPlan, snapshots: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the snapshot of the whole parameter server from those of its shards, in order.

    It does not depend on the number of shards. Vectors [P] are in the order of the model, counts
    are added, and the inverses are those of all shards; the rest is the first shard's.
    """
    merged: dict[str, Array] = {}
    for name, array in snapshots[0].items():
        if _is_vector(name, array):
            slices = [to_tensor(snapshot[name]) for snapshot in snapshots]
            merged[name] = to_array(plan.whole(slices))
        else:
            merged[name] = array
    for snapshot in snapshots[1:]:
        for name, array in snapshot.items():
            if name.startswith(_INVERSES):
                merged[name] = array
            elif name.startswith(_COUNTS):
                merged[name] = merged[name] + array if name in merged else array
    return merged


def split_snapshot(plan: ShardPlan, snapshot: Mapping[str, Array], shard: int) -> dict[str, Array]:
    """Return a shard's part of the snapshot of a parameter server with any number of shards."""
    layout = plan.layouts[shard]
    own: dict[str, Array] = {}
    for name, array in snapshot.items():
        if _is_vector(name, array):
            own[name] = to_array(layout.gather(to_tensor(array)))
        elif not name.startswith((*_COUNTS, _INVERSES)) or (
            shard == 0 and name.startswith(_COUNTS)
        ):
            own[name] = array
    inverses = section(snapshot, _INVERSES)
    for name, array in inverses.items():
        if any(name.startswith(f"{block}/") for block in layout.names):
            own[f"{_INVERSES}{name}"] = array
    return own
