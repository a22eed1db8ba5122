"""The data sets a job specification can name under `data.name`."""

from __future__ import annotations

from collections.abc import Collection

import torch

from kfac_dist.config.problems import did_you_mean
from kfac_dist.data.case_source import CaseSource
from kfac_dist.data.places import Places
from kfac_dist.data.sets.faces import FacesSource
from kfac_dist.data.sets.images import IMAGE_NAMES, ImageSource
from kfac_dist.data.sets.npz import NpzSource
from kfac_dist.data.sets.text import TextSource
from kfac_dist.errors import InvalidSpecError

CASE_NAMES = (*IMAGE_NAMES, FacesSource.name, NpzSource.name)
DATA_NAMES = (*CASE_NAMES, TextSource.name)


def case_source(
    name: str | None, *, limit: int | None, places: Places, dtype: torch.dtype
) -> CaseSource:
    """The set of vectors or images called `name`; InvalidSpecError when there is none."""
    known = _known(name, CASE_NAMES)
    if known == FacesSource.name:
        return FacesSource(limit=limit, places=places, dtype=dtype)
    if known == NpzSource.name:
        return NpzSource(limit=limit, places=places, dtype=dtype)
    return ImageSource(name=known, limit=limit, places=places, dtype=dtype)


def text_source(
    name: str | None, *, limit: int | None, places: Places, dtype: torch.dtype
) -> TextSource:
    """The text called `name`; InvalidSpecError when it is none. Its cases have no `dtype`."""
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
