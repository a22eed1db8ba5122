"""The data sets a job specification can name under `data.name`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch

from kfac_dist.config.problems import did_you_mean
from kfac_dist.data.dataset import BatchedDataset, Split
from kfac_dist.data.places import Places
from kfac_dist.data.sets.faces import FacesSource
from kfac_dist.data.sets.images import IMAGE_NAMES, ImageSource
from kfac_dist.data.sets.npz import NpzSource
from kfac_dist.data.sets.text import TextSource
from kfac_dist.errors import InvalidSpecError

CASE_NAMES = (*IMAGE_NAMES, FacesSource.name, NpzSource.name)
DATA_NAMES = (*CASE_NAMES, TextSource.name)


class CaseSource(Protocol):
    """A named data set of vectors or images, as tasks see it.

    Files are read when a method needs them, not before.
    """

    @property
    def name(self) -> str:
        """Its name in a specification."""
        ...

    def case_shape(self) -> tuple[int, ...]:
        """Return the shape of one input: (channels, height, width) or (features,)."""
        ...

    def num_classes(self) -> int:
        """Return the number of classes; InvalidSpecError if the set has no labels."""
        ...

    def reconstruction(self, split: Split) -> BatchedDataset:
        """Return cases `[N, features]` that are their own targets.

        Images are flattened, with 8-bit pixels scaled to [0, 1].
        """
        ...

    def classification(self, split: Split) -> BatchedDataset:
        """Return cases `[N, *case_shape]` with int64 labels; InvalidSpecError without labels."""
        ...


def find_case_source(
    name: str | None, *, limit: int | None, places: Places, dtype: torch.dtype
) -> CaseSource:
    """Return the set of vectors or images called `name`; InvalidSpecError if unknown.

    Args:
        name: `data.name` of the specification.
        limit: how many training cases, and at most how many test cases, to keep; None for all.
        places: where files are looked for.
        dtype: of the inputs.
    """
    known = _known(name, CASE_NAMES)
    if known == FacesSource.name:
        return FacesSource(limit=limit, places=places, dtype=dtype)
    if known == NpzSource.name:
        return NpzSource(limit=limit, places=places, dtype=dtype)
    return ImageSource(name=known, limit=limit, places=places, dtype=dtype)


def find_text_source(
    name: str | None, *, limit: int | None, places: Places, dtype: torch.dtype
) -> TextSource:
    """Return the text called `name`; InvalidSpecError if it is not a text.

    Characters are integers, so `dtype` is not used; it is there because built-in tasks find their
    data in one way.
    """
    _known(name, (TextSource.name,))
    return TextSource(limit=limit, places=places)


def _known(name: str | None, fitting: Collection[str]) -> str:
    if name is not None and name in fitting:
        return name
    shown, names = name or "null", ", ".join(fitting)
    if name in DATA_NAMES:
        raise InvalidSpecError(f"data.name: {shown} does not fit this task, which takes {names}")
    raise InvalidSpecError(
        f"data.name: {shown} is not a data set of built-in tasks "
        f"({', '.join(DATA_NAMES)}).{did_you_mean(name or '', DATA_NAMES)}"
    )
