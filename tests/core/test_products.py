"""Inverses that are applied in bfloat16."""

import pytest
import torch

from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.directions import DirectionComputer
from kfac_dist.core.inverse.precondition import matrices_of, vector_of
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.products import RoundedCopies, aligned_empty, two_sided
from tests.core.inverse.layers_of_a_chain import STRUCTURES, at, gradients, prepared, structure_of
from tests.oracles.truth.cases import Case

UNIT = 2.0**-8  # the relative error of rounding to bfloat16 is at most half of it


def as_vector(matrices):
    return torch.cat([matrix.reshape(-1) for matrix in matrices.values()])


def test_the_product_has_the_dtype_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    left, V, right = (torch.randn(8, 8, generator=generator) for _ in range(3))
    assert torch.equal(two_sided(left, V, right), left @ V @ right)
    rounded = two_sided(left.bfloat16(), V, right.bfloat16())
    assert rounded.dtype == torch.float32
    error = torch.linalg.matrix_norm(rounded - left @ V @ right)
    bound = 5 * UNIT / 2 * left.norm() * V.norm() * right.norm()
    assert 0 < error <= bound


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_directions_agree_to_the_precision_of_bfloat16_and_descend(inverse):
    structure = structure_of(inverse)
    inverses = at(prepared(structure, dtype=torch.float32), 0)
    matrices = gradients(dtype=torch.float32)
    (rounded,) = RoundedCopies().round([inverses])
    expected, _ = structure.precondition(matrices, inverses, 0.3)
    directions, fallen = structure.precondition(matrices, rounded, 0.3)
    assert fallen == ()
    assert all(direction.dtype == torch.float32 for direction in directions.values())
    error = as_vector(directions) - as_vector(expected)
    assert 0 < error.norm() <= 8 * UNIT * as_vector(expected).norm()
    assert torch.dot(as_vector(directions), as_vector(matrices)) > 0


@pytest.mark.parametrize("inverse", STRUCTURES)
def test_a_matrix_is_rounded_once_while_it_is_in_use(inverse):
    structure = structure_of(inverse)
    inverses = at(prepared(structure, dtype=torch.float32), 0)
    copies = RoundedCopies()
    (first,), (again,) = copies.round([inverses]), copies.round([inverses])
    for name in inverses:
        before, after = first[name].tensors(), again[name].tensors()
        half = [key for key, tensor in before.items() if tensor.dtype == torch.bfloat16]
        assert half
        assert all(before[key] is after[key] for key in half)
    copies.round([])
    (anew,) = copies.round([inverses])
    assert anew["third"].tensors()[half[0]] is not first["third"].tensors()[half[0]]


def test_moments_that_are_observed_leave_the_rounded_basis():
    structure = structure_of("ekfac")
    made = prepared(structure, dtype=torch.float32)
    inverted = {name: by_gamma[0] for name, by_gamma in made.items()}
    inverses = at(made, 0)
    moments = {name: torch.ones_like(inverse.moments) for name, inverse in inverses.items()}
    copies = RoundedCopies()
    later = structure.observe(inverted, moments, 10)
    (before,) = copies.round([inverses])
    (after,) = copies.round([{name: kept.inverse for name, kept in later.items()}])
    assert before["first"].basis.A is after["first"].basis.A
    assert after["first"].moments.dtype == torch.float32


def test_the_update_applies_what_the_settings_say():
    case = Case(widths=(6, 5, 4), activation="tanh", distribution="bernoulli")
    registration = register(case.model().float(), KFACSpec())
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(registration.num_parameters, generator=generator)
    inverses = {
        block.name: KroneckerPair(
            A=torch.linspace(1, 2, block.dim_A).diag(), G=torch.linspace(2, 4, block.dim_G).diag()
        )
        for block in registration.blocks
    }
    directions = {}
    for dtype in ("float32", "bfloat16"):
        settings = kfac_settings({"precondition_dtype": dtype})
        structure = structure_for(settings, registration.names, registration.links)
        computer = DirectionComputer(settings, structure)
        matrices = matrices_of(gradient, registration.blocks)
        (solved,), fallen = computer.compute(matrices, [inverses], [1.0])
        directions[dtype] = vector_of(solved, registration.blocks, gradient)
        assert fallen == ()
    error = (directions["float32"] - directions["bfloat16"]).norm()
    assert 0 < error <= 4 * UNIT * directions["float32"].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_lies_behind_an_aligned_row_is_zero(dtype):
    """oneDNN multiplies it by zero in bfloat16 where the CPU has AMX: a NaN there would spread."""
    freed = [torch.full((784, 64), torch.nan, dtype=dtype) for _ in range(8)]
    like = freed[0][:1]
    del freed
    rows = aligned_empty(like, 784, 13)
    whole = rows.as_strided((784, rows.stride(0)), rows.stride())
    assert rows.stride(0) > 13
    assert torch.equal(whole[:, 13:], torch.zeros_like(whole[:, 13:]))
