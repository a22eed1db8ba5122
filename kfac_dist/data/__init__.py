"""Data sets: readers, the generated ones, and the one way cases reach a worker.

Nothing here reads the environment: the folders to look in are arguments.
"""

from kfac_dist.data.dataset import (
    ArrayDataset,
    BatchedDataset,
    ImageDataset,
    MapDataset,
    Split,
    check_finite,
    fetch,
    limit_cases,
)
from kfac_dist.data.sources import DATA_NAMES, ImageSource, image_source

__all__ = [
    "DATA_NAMES",
    "ArrayDataset",
    "BatchedDataset",
    "ImageDataset",
    "ImageSource",
    "MapDataset",
    "Split",
    "check_finite",
    "fetch",
    "image_source",
    "limit_cases",
]
