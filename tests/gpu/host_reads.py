"""Counts how often a block of code reads numbers of tensors on the host.

On a GPU each of these reads waits for all the work before it. They are counted on the CPU, where
nothing waits: what is read is the same.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paths import ROOT

# `item`, `float`, `int`, `bool` and `if` of a tensor; and operations whose shape depends on values.
_OPERATIONS = ("aten._local_scalar_dense", "aten.nonzero", "aten._unique2", "aten.masked_select")
# These reach no operation on the CPU.
_METHODS = (torch.Tensor.tolist, torch.Tensor.cpu)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(call, args):
            self._found[_place()] += 1
        return call(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call in _METHODS:
            self._found[_place()] += 1
        return call(*args, **(kwargs or {}))


def _reads(call: Any, args: Any) -> bool:
    if str(call).startswith("aten.index."):  # with a mask, the shape depends on its values
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return str(call).startswith(_OPERATIONS)


def _place() -> str:
    """Return the innermost line of the library that is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("kfac_dist", "workers"):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Yield a counter of the reads of this thread in the block, by line of the library."""
    found: Counter[str] = Counter()
    with _Operations(found), _Methods(found):
        yield found
