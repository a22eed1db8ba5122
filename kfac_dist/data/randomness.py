"""Which random numbers a user's data set draws, whichever process reads it, and whenever.

Augmentations draw from the global generators of Python, NumPy and torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_NUMPY_SEEDS = 2**32


def seed_generators(key: int) -> None:
    """Seed all three generators of this process from `key`, a number of up to 64 bits."""
    random.seed(key)
    np.random.seed(key % _NUMPY_SEEDS)  # the one that user code draws from
    torch.default_generator.manual_seed(key)


class OwnRandomness:
    """Generators of their own for code that is run piece by piece among other code.

    The pieces draw the same numbers as if they ran one after the other, and change nothing for the
    code between them.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._states: tuple[Any, ...] | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the block draw on from where the block before it has ended."""
        outer = _states()
        if self._states is None:
            seed_generators(self._key)
        else:
            _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(outer)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    python, numpy, torch_state = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.default_generator.set_state(torch_state)
