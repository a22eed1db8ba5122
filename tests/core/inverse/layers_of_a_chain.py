"""Three layers with correlated statistics, and their inverses by any structure."""

from itertools import pairwise

import torch

from kfac_dist.config import kfac_settings
from kfac_dist.core.factors import KroneckerPair, LayerSnapshot, Link
from kfac_dist.core.inverse.structure import structure_for

STRUCTURES = ("block_diagonal", "block_tridiagonal", "ekfac")
NAMES = ("first", "second", "third")
SIZES = {"first": (4, 3), "second": (3, 3), "third": (4, 2)}
GAMMAS = (0.3, 0.2, 0.45)


def structure_of(inverse, names=NAMES, **options):
    links = tuple(Link(*pair) for pair in pairwise(names))
    return structure_for(kfac_settings({"inverse": inverse, **options}), names, links)


def snapshots(dtype=torch.float64, seed=0, num_cases=30):
    generator = torch.Generator().manual_seed(seed)

    def rows(which):
        common = torch.randn(num_cases, 4, generator=generator, dtype=torch.float64)
        return {
            name: (
                common[:, : size[which]]
                + torch.randn(num_cases, size[which], generator=generator, dtype=torch.float64)
            ).to(dtype)
            for name, size in SIZES.items()
        }

    inputs, gradients = rows(0), rows(1)

    def pair(left, right):
        return KroneckerPair(
            A=inputs[left].T @ inputs[right] / num_cases,
            G=gradients[left].T @ gradients[right] / num_cases,
        )

    following = dict(zip(NAMES, (*NAMES[1:], None), strict=True))
    return {
        name: LayerSnapshot(
            step=5,
            pair=pair(name, name),
            next_pair=pair(after, after) if after else None,
            cross=pair(name, after) if after else None,
        )
        for name, after in following.items()
    }


def gradients(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(dim_G, dim_A, generator=generator, dtype=torch.float64).to(dtype)
        for name, (dim_A, dim_G) in SIZES.items()
    }


def prepared(structure, gammas=GAMMAS, **options):
    return {
        name: structure.invert_at_gammas(snapshot, gammas)
        for name, snapshot in snapshots(**options).items()
    }


def at(inverted_by_layer, number):
    return {name: inverted[number].inverse for name, inverted in inverted_by_layer.items()}
