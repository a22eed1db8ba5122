"""Which shard of the parameter server owns which blocks of the parameters?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kfac_dist.coordination.checks import check_interval

# What it costs to receive, add, apply and send an element, in multiplications of a product.
_ELEMENT_COST = 64


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """A block of the parameters: a matrix [dim_G, dim_A].

    Blocks of the same `chain` are preconditioned together and stay together; None for a block
    that stands alone.
    """

    dim_G: int
    dim_A: int
    chain: int | None = None

    @property
    def cost(self) -> int:
        """The work of a shard for this block in a step: multiplications, and elements moved."""
        elements = self.dim_G * self.dim_A
        return elements * (self.dim_G + self.dim_A + _ELEMENT_COST)


def assign_shards(blocks: Sequence[BlockSize], num_shards: int) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the blocks of each shard, ascending.

    The costliest block is given out first, always to the shard with the least work. Shards that
    would have no block are left out, so there may be fewer than `num_shards`. The result depends
    on nothing else: every process finds the same one.

    Raises:
        InvalidSpecError: `num_shards` is below 1.
    """
    check_interval("number of shards", num_shards, 1)
    chains: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        # A block that stands alone is a chain of its own, with a number no other one has.
        key = -1 - number if block.chain is None else block.chain
        chains.setdefault(key, []).append(number)
    costs = {key: sum(blocks[n].cost for n in numbers) for key, numbers in chains.items()}
    loads = [0] * num_shards
    owned: list[list[int]] = [[] for _ in range(num_shards)]
    for key in sorted(chains, key=lambda key: (-costs[key], chains[key][0])):
        shard = loads.index(min(loads))
        loads[shard] += costs[key]
        owned[shard] += chains[key]
    used = [tuple(sorted(numbers)) for numbers in owned if numbers]
    return tuple(sorted(used))  # the first shard has the first block


def chains_of(names: Sequence[str], links: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return a number for each of `names` that is linked to another; linked ones share it."""
    chains: dict[str, int] = {}
    for first, second in links:
        known = chains.get(first, chains.get(second, names.index(first)))
        other = chains.get(second, known)
        merged = {name: known for name, chain in chains.items() if chain == other}
        chains |= {first: known, second: known} | merged
    return chains
