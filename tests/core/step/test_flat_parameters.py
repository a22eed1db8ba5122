"""The parameters of a model as one vector: read again, and gathered into memory that is kept."""

import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.blocks.registration import Registration, register
from kfac_dist.core.step.block_numbers import direction_numbers
from kfac_dist.core.step.flat_parameters import FlatParameters
from kfac_dist.errors import InvalidSpecError

L2 = 0.5


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def registration(model: nn.Module) -> Registration:
    return register(model, kfac_settings({}))


@pytest.fixture
def flat(model: nn.Module, registration: Registration) -> FlatParameters:
    return FlatParameters(list(model.parameters()), BlockLayout(registration.blocks), L2)


def test_the_parameters_are_those_of_the_time_of_reading(model, flat):
    for _ in range(2):
        expected = nn.utils.parameters_to_vector(model.parameters())
        assert torch.equal(flat.read(), expected)
        with torch.no_grad():
            model[0].weight.add_(1.0)


def test_the_l2_term_is_half_the_square_of_all_parameters(model, registration, flat):
    theta = flat.read()
    assert flat.l2_term(theta) == pytest.approx(0.5 * L2 * theta.square().sum().item(), rel=1e-14)
    without = FlatParameters(list(model.parameters()), BlockLayout(registration.blocks), 0.0)
    assert without.l2_term(theta) == 0.0


def test_each_use_has_its_own_memory(registration, flat):
    theta = flat.read().clone()
    first, other = flat.gather(theta, "gradient"), flat.gather(2 * theta, "previous")
    assert torch.equal(other, 2 * first)
    assert flat.gather(3 * theta, "gradient") is first


def test_directions_by_block_are_vectors_of_parameters(registration, flat):
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn((2, registration.num_parameters), dtype=torch.float64, generator=generator)
    solved = [{block.name: block.matrix(v) for block in registration.blocks} for v in whole]
    vectors, by_block = flat.directions(solved)
    assert torch.equal(vectors, whole)
    gradient, previous = whole[0] + 1, whole[1] - 1
    numbers = direction_numbers(flat.numbers(flat.gather(gradient, "g"), by_block, previous))
    assert numbers.gradient_previous == pytest.approx((gradient @ previous).item(), rel=1e-12)
    for triple, vector in zip(numbers.directions, whole, strict=True):
        expected = [(vector @ other).item() for other in (gradient, vector, previous)]
        assert list(triple) == pytest.approx(expected, rel=1e-12)


def test_a_saved_vector_of_another_length_is_refused(flat):
    flat.check_same_size(torch.zeros(26))
    with pytest.raises(InvalidSpecError, match="it has 5 parameters, this one has 26"):
        flat.check_same_size(torch.zeros(5))
