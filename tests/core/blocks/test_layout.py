"""Block vectors: whole blocks in one piece, each at the same alignment."""

import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.blocks.registration import Registration, register

LINE = 32
SETTINGS = kfac_settings({})


class Net(nn.Module):
    """Split, grouped and unit-wise blocks, which lie in many pieces of the parameter vector."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.out = nn.Linear(6, 9)


@pytest.fixture(params=[{}, {"max_factor_dim": 3}], ids=str)
def registration(request) -> Registration:
    return register(Net(), kfac_settings(request.param))


def vector_of(registration: Registration) -> torch.Tensor:
    return torch.arange(1.0, registration.num_parameters + 1, dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_layouts_gather_they_scatter_back(registration, stride):
    vector = vector_of(registration)
    back = torch.zeros_like(vector)
    for first in range(stride):
        layout = BlockLayout(registration.blocks[first::stride])
        layout.scatter(layout.gather(vector), back)
    assert torch.equal(back, vector)


def test_the_matrices_are_those_of_the_parameter_vector(registration):
    layout = BlockLayout(registration.blocks)
    values = layout.gather(vector_of(registration))
    assert len(values) == layout.size
    for block, matrix in zip(registration.blocks, layout.matrices(values).values(), strict=True):
        assert torch.equal(matrix, block.matrix(vector_of(registration)))
        is_view = matrix.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        assert is_view == (len(block.parts) == 1)


def test_the_regions_are_views_that_begin_at_cache_lines(registration):
    layout = BlockLayout(registration.blocks)
    values = layout.gather(vector_of(registration))
    regions = layout.regions(values)
    assert tuple(regions) == layout.names == registration.names
    for block, region in zip(registration.blocks, regions.values(), strict=True):
        assert region.shape == (block.dim_G * block.dim_A,)
        assert (region.data_ptr() - values.data_ptr()) % (LINE * values.element_size()) == 0
        in_parts = [part.view(vector_of(registration)).reshape(-1) for part in block.parts]
        assert torch.equal(region, torch.cat(in_parts)), "one part after the other"


def test_the_gaps_are_zero_and_less_than_a_line_a_block(registration):
    layout = BlockLayout(registration.blocks)
    values = layout.gather(vector_of(registration))
    assert values.count_nonzero() == registration.num_parameters
    assert layout.size - registration.num_parameters < LINE * len(registration.blocks)
    assert layout.size % LINE == 0


def test_a_block_vector_is_gathered_into_memory_that_is_there(registration):
    layout = BlockLayout(registration.blocks)
    vector = vector_of(registration)
    memory = vector.new_zeros(layout.size)
    for scale in (1.0, 2.0):
        assert layout.gather(scale * vector, memory) is memory
        assert torch.equal(memory, layout.gather(scale * vector))


def test_matrices_are_written_into_a_block_vector(registration):
    layout = BlockLayout(registration.blocks)
    values = layout.gather(vector_of(registration))
    matrices = {name: -matrix for name, matrix in layout.matrices(values).items()}
    written = torch.zeros_like(values)
    layout.write(matrices, written)
    assert torch.equal(written, -values)


def test_a_product_over_a_block_rounds_in_the_same_way_whichever_blocks_lie_before_it():
    registration = register(nn.Sequential(*(nn.Linear(k, k + 1) for k in range(3, 9))), SETTINGS)
    vector = torch.randn(registration.num_parameters, generator=torch.Generator().manual_seed(0))

    def squares(layout: BlockLayout) -> dict[str, float]:
        regions = layout.regions(layout.gather(vector)).items()
        return {name: torch.dot(region, region).item() for name, region in regions}

    together = squares(BlockLayout(registration.blocks))
    for block in registration.blocks:
        assert squares(BlockLayout([block])) == {block.name: together[block.name]}
