"""Random numbers that depend on their purpose and not on the process that draws them.

Every draw is keyed by (seed, purpose, step or epoch, row), so every split of a batch over workers
gets the same shuffled order and the same sampled targets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Rows of noise that are drawn under one key. A generator for each row would cost more than the
# draws.
_ROWS_PER_KEY = 64
_MASK = (1 << 64) - 1

_SHUFFLE = 1
_NOISE = 2
_STREAM = 3
_CASE = 4


def _mix(*words: int) -> int:
    """Fold integers into one well-mixed 64-bit key (splitmix64 steps)."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + word * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def stream_key(seed: int, step: int, first_row: int) -> int:
    """Return a key for random streams that the model draws from itself in a statistics pass."""
    return _mix(seed, _STREAM, step, first_row) >> 1


def case_key(seed: int, epoch: int | None, case: int) -> int:
    """Return a key for what a user's data set draws for a case; `epoch` is None in evaluations."""
    return _mix(seed, _CASE, 0 if epoch is None else epoch + 1, case)


def permutation(seed: int, epoch: int, num_cases: int, out: Tensor | None = None) -> Tensor:
    """Return the order [num_cases], int64 on the CPU, in which an epoch visits the cases.

    It is written to `out` [num_cases] if that is given.
    """
    generator = torch.Generator().manual_seed(_mix(seed, _SHUFFLE, epoch))
    return torch.randperm(num_cases, generator=generator, out=out)


def keyed_noise(
    kind: Literal["uniform", "normal"],
    *,
    seed: int,
    step: int,
    rows: range,
    shape: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """Return standard noise [len(rows), *shape].

    Args:
        kind: uniform on [0, 1) or normal with mean 0 and variance 1.
        seed: the seed of the run.
        step: the step that the noise is for.
        rows: contiguous places of cases in the whole batch of the step. The noise of a row depends
            on (seed, step, row) alone.
        shape: the shape of the noise of a row.
        like: a tensor with the dtype and the device of the noise.
    """
    if len(rows) == 0:
        return like.new_empty((0, *shape))
    draw = torch.rand if kind == "uniform" else torch.randn
    first = rows.start // _ROWS_PER_KEY
    blocks = []
    for block in range(first, (rows.stop - 1) // _ROWS_PER_KEY + 1):
        generator = torch.Generator(device=like.device)
        generator.manual_seed(_mix(seed, _NOISE, step, block))
        blocks.append(
            draw(
                (_ROWS_PER_KEY, *shape),
                generator=generator,
                dtype=like.dtype,
                device=like.device,
            )
        )
    offset = rows.start - first * _ROWS_PER_KEY
    return torch.cat(blocks)[offset : offset + len(rows)]
