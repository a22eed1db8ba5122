"""Factors of a layer of 3 inputs and 2 outputs, and the rungs it takes to invert them at GAMMA.

The serial optimizer and the distributed run must count the same rungs by the same names.
"""

import math

import torch

from kfac_dist.core.factors import KroneckerPair

GAMMA = 1e-8  # lost beside 1 in float32


def _pair(A):
    return KroneckerPair(A=A, G=torch.eye(2))


FACTORS = {
    "sound": _pair(torch.eye(4)),
    "not_finite": _pair(torch.full((4, 4), math.nan)),
    "singular": _pair(torch.ones(4, 4)),
    "indefinite": _pair(torch.tensor([5.0, -1e-4, 1.0, 1.0]).diag()),
    "hopeless": _pair(torch.tensor([1e9, -1e9, 1.0, 1.0]).diag()),
}
# In this order: a failed inversion keeps the last inverse only if there is one.
LADDER = (
    ("hopeless", {"no_inverse": 1}),
    ("sound", {}),
    ("not_finite", {"refused_statistics": 1}),
    ("singular", {"float64": 1}),
    ("indefinite", {"float64": 1, "raised_damping": 4}),
    ("hopeless", {"kept_inverse": 1}),
)
EVENTS = {
    "refused_statistics",
    "float64",
    "raised_damping",
    "kept_inverse",
    "no_inverse",
    "gradient_fallback",
    "bad_step",
}
