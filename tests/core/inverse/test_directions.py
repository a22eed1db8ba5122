"""From gradients to directions at one or several gammas, in the type that the options say."""

import pytest
import torch

from kfac_dist.config import kfac_settings
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.directions import DirectionComputer
from kfac_dist.core.inverse.structure import structure_for

SHAPES = {"a": (3, 4), "b": (2, 3)}


def matrices(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def inverses(scale: float) -> dict[str, KroneckerPair]:
    generator = torch.Generator().manual_seed(7)

    def definite(order: int) -> torch.Tensor:
        root = torch.randn(order, order, generator=generator)
        return root @ root.T + torch.eye(order)

    return {
        name: KroneckerPair(A=scale * definite(dim_A), G=definite(dim_G))
        for name, (dim_G, dim_A) in SHAPES.items()
    }


def computer(**options: object) -> DirectionComputer:
    settings = kfac_settings(options)
    return DirectionComputer(settings, structure_for(settings, list(SHAPES), []))


def test_there_is_a_direction_for_each_gamma():
    gradient, tried = matrices(0), [inverses(1.0), inverses(2.0)]
    directions, fallen = computer().compute(gradient, tried, [0.5, 0.25])
    assert fallen == ()
    for found, by_layer in zip(directions, tried, strict=True):
        assert list(found) == list(SHAPES)
        for name, V in gradient.items():
            torch.testing.assert_close(found[name], by_layer[name].G @ V @ by_layer[name].A)


def test_a_block_that_falls_back_in_any_direction_is_named_once():
    nan = torch.full((3, 3), torch.nan)
    broken = inverses(1.0) | {"b": KroneckerPair(A=nan, G=torch.eye(2))}
    gradient = matrices(0)
    directions, fallen = computer().compute(gradient, [inverses(1.0), broken, broken], [1.0] * 3)
    assert fallen == ("b",)
    assert all(torch.isfinite(m).all() for found in directions for m in found.values())


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 3e-2)], ids=["float32", "bfloat16"]
)
def test_the_error_is_that_of_the_type_of_the_products(dtype, bound):
    gradient, tried = matrices(0), inverses(1.0)
    (found,), _ = computer(precondition_dtype=dtype).compute(gradient, [tried], [1.0])
    for name, V in gradient.items():
        exact = tried[name].G.double() @ V.double() @ tried[name].A.double()
        error = (found[name] - exact).norm() / exact.norm()
        assert 1e-3 * bound < error < bound
        assert found[name].dtype == torch.float32
