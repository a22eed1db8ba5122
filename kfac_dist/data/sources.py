"""The data sets a job specification can name under `data.name`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kfac_dist.config.wording import did_you_mean
from kfac_dist.data.curves import NUM_CASES, load_curves
from kfac_dist.data.dataset import ImageDataset, Split, num_limited
from kfac_dist.data.digits import load_digits
from kfac_dist.data.mnist import MnistReader
from kfac_dist.errors import InvalidSpecError

DATA_NAMES = ("mnist", "mnist-5k", "curves")
_UNLABELLED = ("curves",)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A named set of 28x28 images; `limit` keeps the first cases of each split."""

    name: str
    limit: int | None
    cache_dir: Path
    dtype: torch.dtype

    num_pixels = 784

    def reconstruction(self, split: Split, data_dir: Path | None) -> ImageDataset:
        """Images that are their own targets, in [0, 1]."""
        return self._dataset(self._images(split, data_dir), None, split)

    def classification(self, split: Split, data_dir: Path | None) -> ImageDataset:
        """Images in [0, 1] with int64 labels; InvalidSpecError when the set has none."""
        if self.name in _UNLABELLED:
            raise InvalidSpecError(f"data.name: {self.name} has no labels to classify")
        if self.name == "mnist-5k":
            images, labels = load_digits(split)
        else:
            reader = MnistReader(data_dir=data_dir, cache_dir=self.cache_dir)
            images, labels = reader.images(split), reader.labels(split)
        return self._dataset(images, labels, split)

    def _images(self, split: Split, data_dir: Path | None) -> NDArray[np.uint8]:
        if self.name == "mnist-5k":
            return load_digits(split)[0]
        if self.name == "curves":
            return load_curves(split, num_limited(split, NUM_CASES[split], self.limit, self.name))
        return MnistReader(data_dir=data_dir, cache_dir=self.cache_dir).images(split)

    def _dataset(
        self, images: NDArray[np.uint8], labels: NDArray[np.uint8] | None, split: Split
    ) -> ImageDataset:
        kept = num_limited(split, len(images), self.limit, self.name)
        pixels = torch.from_numpy(images[:kept])
        targets = None if labels is None else torch.from_numpy(labels[:kept]).to(torch.int64)
        return ImageDataset(pixels, targets, self.dtype)


def image_source(
    name: str | None, *, limit: int | None, cache_dir: Path, dtype: torch.dtype
) -> ImageSource:
    """The data set called `name`; InvalidSpecError when there is none of that name."""
    if name not in DATA_NAMES:
        raise InvalidSpecError(
            f"data.name: {name or 'null'} is not a data set of built-in tasks "
            f"({', '.join(DATA_NAMES)}).{did_you_mean(name or '', DATA_NAMES)}"
        )
    return ImageSource(name=name, limit=limit, cache_dir=cache_dir, dtype=dtype)
