"""Data sets: readers, the generated ones, and the one way cases reach a worker.

Nothing here reads the environment: the folders to look in are arguments.
"""

from kfac_dist.data.case_source import CaseSource
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
from kfac_dist.data.places import Places
from kfac_dist.data.sets.text import TextSource
from kfac_dist.data.sources import DATA_NAMES, case_source, text_source

__all__ = [
    "DATA_NAMES",
    "ArrayDataset",
    "BatchedDataset",
    "CaseSource",
    "ImageDataset",
    "MapDataset",
    "Places",
    "Split",
    "TextSource",
    "case_source",
    "check_finite",
    "fetch",
    "limit_cases",
    "text_source",
]
