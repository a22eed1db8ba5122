"""Data sets: the named ones, the formats of their files, and `fetch`, which makes batches.

Nothing here reads the environment: the folders to search are arguments.
"""

from kfac_dist.data.checked import StartCheck, check_before_start, fetch_checked
from kfac_dist.data.dataset import (
    ArrayDataset,
    BatchedDataset,
    ImageDataset,
    MapDataset,
    Split,
    check_cases,
    check_finite,
    collate,
    fetch,
    gather_at_once,
    limit_cases,
    num_limited,
)
from kfac_dist.data.places import Places
from kfac_dist.data.randomness import seed_generators
from kfac_dist.data.sets.text import TextSource
from kfac_dist.data.sources import DATA_NAMES, CaseSource, find_case_source, find_text_source
from kfac_dist.data.stream_reader import StreamReader

__all__ = [
    "DATA_NAMES",
    "ArrayDataset",
    "BatchedDataset",
    "CaseSource",
    "ImageDataset",
    "MapDataset",
    "Places",
    "Split",
    "StartCheck",
    "StreamReader",
    "TextSource",
    "check_before_start",
    "check_cases",
    "check_finite",
    "collate",
    "fetch",
    "fetch_checked",
    "find_case_source",
    "find_text_source",
    "gather_at_once",
    "limit_cases",
    "num_limited",
    "seed_generators",
]
