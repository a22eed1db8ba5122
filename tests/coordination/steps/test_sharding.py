from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.sharding import BlockSize, assign_shards, chains_of
from kfac_dist.errors import InvalidSpecError

BLOCKS = st.lists(
    st.builds(
        BlockSize,
        dim_G=st.integers(1, 300),
        dim_A=st.integers(1, 300),
        chain=st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=14,
)


def chains(blocks: list[BlockSize]) -> list[list[int]]:
    """The numbers of the blocks that must stay together."""
    by_chain: dict[int, list[int]] = {}
    alone = []
    for number, block in enumerate(blocks):
        if block.chain is None:
            alone.append([number])
        else:
            by_chain.setdefault(block.chain, []).append(number)
    return [*by_chain.values(), *alone]


@given(BLOCKS, st.integers(1, 8))
def test_every_block_is_in_exactly_one_shard(blocks: list[BlockSize], num_shards: int) -> None:
    shards = assign_shards(blocks, num_shards)
    assert sorted(number for shard in shards for number in shard) == list(range(len(blocks)))
    assert all(list(shard) == sorted(shard) for shard in shards)
    assert shards[0][0] == 0, "the first shard has the first block"


@given(BLOCKS, st.integers(1, 8))
def test_the_blocks_of_a_chain_stay_together(blocks: list[BlockSize], num_shards: int) -> None:
    shards = assign_shards(blocks, num_shards)
    for chain in chains(blocks):
        assert len({k for k, shard in enumerate(shards) if set(chain) & set(shard)}) == 1


@given(BLOCKS, st.integers(1, 8))
def test_there_are_as_many_shards_as_asked_for_or_as_there_are_chains(
    blocks: list[BlockSize], num_shards: int
) -> None:
    assert len(assign_shards(blocks, num_shards)) == min(num_shards, len(chains(blocks)))


@given(BLOCKS.map(lambda blocks: blocks[:6]), st.integers(1, 3))
def test_the_most_work_is_within_grahams_bound_of_the_best_plan(
    blocks: list[BlockSize], num_shards: int
) -> None:
    """Longest first, to the one with the least: at most 4/3 - 1/(3 S) of the best."""
    shards = assign_shards(blocks, num_shards)
    most = max(sum(blocks[number].cost for number in shard) for shard in shards)
    costs = [sum(blocks[number].cost for number in chain) for chain in chains(blocks)]
    best = min(
        max(sum(c for c, s in zip(costs, plan, strict=True) if s == k) for k in range(num_shards))
        for plan in product(range(num_shards), repeat=len(costs))
    )
    assert 3 * num_shards * most <= (4 * num_shards - 1) * best


@given(BLOCKS, st.integers(1, 8))
def test_the_plan_depends_on_nothing_else(blocks: list[BlockSize], num_shards: int) -> None:
    copies = [BlockSize(dim_G=b.dim_G, dim_A=b.dim_A, chain=b.chain) for b in blocks]
    assert assign_shards(blocks, num_shards) == assign_shards(copies, num_shards)


def test_the_shards_of_a_transformer_have_about_the_same_work() -> None:
    layers = [(768, 769), (768, 769), (768, 769), (768, 769), (3072, 769), (768, 3073)]
    blocks = [BlockSize(dim_G=G, dim_A=A) for _ in range(12) for G, A in layers]
    for num_shards in (2, 4, 8, 16):
        shards = assign_shards(blocks, num_shards)
        loads = [sum(blocks[number].cost for number in shard) for shard in shards]
        assert max(loads) <= 1.35 * sum(loads) / num_shards


def test_linked_layers_share_a_number() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    assert chains_of(names, []) == {}
    chain = chains_of(names, [("a", "b"), ("d", "e"), ("b", "c")])
    assert chain["a"] == chain["b"] == chain["c"] != chain["d"] == chain["e"]
    assert "f" not in chain


@given(st.permutations(list(pairwise("abcd")) + list(pairwise("efg"))))
def test_the_order_of_the_links_does_not_matter(links: list[tuple[str, str]]) -> None:
    chain = chains_of(list("abcdefgh"), links)
    assert len({chain[name] for name in "abcd"}) == 1
    assert len({chain[name] for name in "efg"}) == 1
    assert chain["a"] != chain["e"]
    assert chain.keys() == set("abcdefg")


def test_no_shard_at_all_is_refused() -> None:
    with pytest.raises(InvalidSpecError, match="number of shards must be at least 1; got 0"):
        assign_shards([BlockSize(dim_G=1, dim_A=1)], 0)
