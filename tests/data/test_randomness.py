"""Code that runs piece by piece draws what it would in one piece, and disturbs nobody."""

from __future__ import annotations

import random

import numpy as np
import torch

from kfac_dist.data.randomness import OwnRandomness, seed_generators


def draw() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_pieces_draw_what_the_whole_draws_and_the_code_between_them_what_it_would_alone():
    seed_generators(2**63 + 5)
    whole = [draw() for _ in range(3)]
    seed_generators(11)
    alone = [draw() for _ in range(3)]

    seed_generators(11)
    own, pieces, between = OwnRandomness(2**63 + 5), [], []
    for _ in range(3):
        with own.used():
            pieces.append(draw())
        between.append(draw())
    assert (pieces, between) == (whole, alone)
