"""The arithmetic of K-FAC's own work: full precision, although the caller asks for less.

A user's autocast, or TF32 products that are allowed for the whole process, would reach factors,
inverses and Fisher products. Factors are sums of many products, and inverses magnify their errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_FULL_PRECISION = "ieee"
_NOT_REDUCED = ("none", _FULL_PRECISION)  # what torch calls the default, and full precision


def _backends() -> dict[str, Any]:
    return {
        "cuda.matmul": torch.backends.cuda.matmul,
        "mkldnn.matmul": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        "mkldnn.conv": torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        "mkldnn.rnn": torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
    }


class _Settings:
    """The settings of torch for float32 products, as they were before they were changed.

    torch has one setting for each backend, and an older one for all, which cannot be read once
    they disagree. Convolutions on GPUs are left as torch has them, whose default is TF32.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str]] = []
        self._older: str | None = None

    def change(self) -> None:
        """Ask for full precision where less is allowed."""
        found = [(backend, str(backend.fp32_precision)) for backend in _backends().values()]
        whole: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
        reduced = [value for _, value in found if value not in _NOT_REDUCED]
        if not reduced and whole in _NOT_REDUCED:
            return
        self._before = found
        try:
            self._older = torch.get_float32_matmul_precision()
        except RuntimeError:
            self._older = None  # the settings disagree, so there is no older one to restore
        else:
            torch.set_float32_matmul_precision("highest")
        for backend, _ in found:
            backend.fp32_precision = _FULL_PRECISION

    def restore(self) -> None:
        """Set what `change` has changed to what it was."""
        if self._older is not None:
            torch.set_float32_matmul_precision(self._older)
        for backend, value in self._before:
            backend.fp32_precision = value


class _FullPrecision:
    """Keeps the process at full float32 products while at least one thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._settings = _Settings()

    def enter(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._settings = _Settings()
                self._settings.change()
            self._num_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._settings.restore()


_FULL = _FullPrecision()


def float32_precision() -> str:
    """Return what torch's settings allow for float32 products, for the records of a run.

    `highest`, `high` or `medium`, where one of them describes all settings; otherwise those of the
    backends that allow less than full precision.
    """
    found = {name: str(backend.fp32_precision) for name, backend in _backends().items()}
    reduced = [f"{name} {value}" for name, value in found.items() if value not in _NOT_REDUCED]
    try:
        whole: str = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings disagree
        whole = "highest"
    return whole if whole != "highest" or not reduced else ", ".join(reduced)


def in_full_precision(work: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function or method work in `full_precision`, on every device that there is."""

    @wraps(work)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(full_precision(torch.device(kind)))
            return work(*args, **kwargs)

    return wrapped


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn off autocast on `device`, and reduced float32 products everywhere, inside.

    The setting of float32 products is one for the process. It is restored when the last thread
    has left; products that other threads compute in the meantime are in full precision, too.
    """
    _FULL.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _FULL.leave()
