"""The sets of 8-bit images of one shape: MNIST, its small version, curves and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from kfac_dist.data.dataset import ChannelScale, ImageDataset, Split, num_limited
from kfac_dist.data.places import Places
from kfac_dist.data.sets.cifar10 import SHAPE, Cifar10Reader
from kfac_dist.data.sets.curves import NUM_CASES, load_curves
from kfac_dist.data.sets.digits import load_digits
from kfac_dist.data.sets.mnist import MnistReader
from kfac_dist.errors import InvalidSpecError

IMAGE_NAMES = ("mnist", "mnist-5k", "curves", "cifar10")
_UNLABELLED = ("curves",)
_GRAY = (1, 28, 28)
_NUM_CLASSES = 10

# Of all training images; published results on CIFAR-10 use these numbers.
_CIFAR10_SCALE = ChannelScale(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A named set of images; `limit` keeps the first cases of each split."""

    name: str
    limit: int | None
    places: Places
    dtype: torch.dtype

    def case_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width)."""
        return SHAPE if self.name == "cifar10" else _GRAY

    def num_classes(self) -> int:
        """Return 10; InvalidSpecError if the set has no labels."""
        if self.name in _UNLABELLED:
            raise InvalidSpecError(f"data.name: {self.name} has no labels to classify")
        return _NUM_CLASSES

    def reconstruction(self, split: Split) -> ImageDataset:
        """Return flat images in [0, 1] that are their own targets."""
        images = self._images(split)
        kept = num_limited(split, len(images), self.limit, self.name)
        pixels = torch.from_numpy(images[:kept]).view(kept, prod(self.case_shape()))
        return ImageDataset(pixels, None, self.dtype)

    def classification(self, split: Split) -> ImageDataset:
        """Return images with int64 labels; gray ones in [0, 1], those of CIFAR-10 standardised."""
        self.num_classes()
        images, labels = self._labelled(split)
        kept = num_limited(split, len(images), self.limit, self.name)
        pixels = torch.from_numpy(images[:kept]).view(kept, *self.case_shape())
        scale = _CIFAR10_SCALE if self.name == "cifar10" else None
        return ImageDataset(pixels, torch.from_numpy(labels[:kept]), self.dtype, scale)

    def _labelled(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if self.name == "mnist-5k":
            return load_digits(split)
        if self.name == "cifar10":
            return Cifar10Reader(places=self.places).read(split)
        reader = MnistReader(places=self.places)
        return reader.images(split), reader.labels(split)

    def _images(self, split: Split) -> NDArray[np.uint8]:
        if self.name == "mnist-5k":
            return load_digits(split)[0]
        if self.name == "cifar10":
            return Cifar10Reader(places=self.places).read(split)[0]
        if self.name == "curves":
            return load_curves(split, num_limited(split, NUM_CASES[split], self.limit, self.name))
        return MnistReader(places=self.places).images(split)
