"""`text`: a plain text file as characters; its last tenth is the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfac_dist.data.dataset import BatchedDataset, Split, num_limited
from kfac_dist.data.decoded import Arrays, decoded_arrays
from kfac_dist.data.places import Places
from kfac_dist.errors import DataError, DataNotFoundError, InvalidSpecError

_TEST_FRACTION = 10  # one in this many characters is a test character


class WindowDataset(BatchedDataset):
    """Windows of a sequence: the input is `[context]`, the target the same window shifted by one.

    `codes` are integers `[length]`; window i begins at `i * stride`.
    """

    reads_in_threads = True

    def __init__(self, codes: Tensor, *, context: int, stride: int, num_windows: int) -> None:
        self._codes = codes
        self._offsets = torch.arange(context + 1)
        self._stride = stride
        self._num_windows = num_windows

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._num_windows:
            raise IndexError(index)  # ends an iteration over the data set
        inputs, targets = self.gather_cases(torch.tensor([index]))
        return inputs[0], targets[0]

    def gather_cases(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets `[n, context]`, int64."""
        places = (indices * self._stride)[:, None] + self._offsets
        windows = self._codes[places].to(torch.int64)
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The UTF-8 file `input.txt`, or the only .txt file, in `places`.

    Subfolders `text/` and `tinyshakespeare/` are searched, too.

    `limit` keeps the first windows of each split.
    """

    limit: int | None
    places: Places

    name = "text"

    def vocabulary(self) -> str:
        """Return the distinct characters of the file; the code of each is its position here."""
        return "".join(map(chr, self._encode()[0]))

    def windows(self, split: Split, *, context: int, stride: int) -> WindowDataset:
        """Return the windows of `context` characters in the split; they begin `stride` apart.

        Raises InvalidSpecError if the split is too short for a window.
        """
        codes = self._encode()[1]
        num_test = len(codes) // _TEST_FRACTION
        num_train = len(codes) - num_test
        part = codes[:num_train] if split == "train" else codes[num_train:]
        if len(part) <= context:
            raise InvalidSpecError(
                f"task_args.context: {context} characters and the next one are more than the "
                f"{split} split has: {len(part)} of the {len(codes)} characters of {self._path()}; "
                "use a smaller context or a longer text"
            )
        num_windows = (len(part) - context - 1) // stride + 1
        kept = num_limited(split, num_windows, self.limit, f"{self._path()} at context {context}")
        return WindowDataset(
            torch.from_numpy(part), context=context, stride=stride, num_windows=kept
        )

    def _encode(self) -> tuple[NDArray[np.uint32], NDArray[Any]]:
        """Return the distinct code points, ascending, and the index of each character in them."""
        path = self._path()
        arrays = decoded_arrays(self.places.cache_dir, [path], "text", lambda: _decode(path))
        return arrays["vocabulary"], arrays["codes"]

    def _path(self) -> Path:
        return self.places.find(
            "text", folders=["text", "tinyshakespeare"], names=["input.txt"], patterns=["*.txt"]
        )


def _decode(path: Path) -> Arrays:
    points = np.frombuffer(_read(path).encode("utf-32-le"), np.uint32)
    vocabulary, codes = np.unique(points, return_inverse=True)
    narrow = np.uint8 if len(vocabulary) <= np.iinfo(np.uint8).max else np.int32
    return {"vocabulary": vocabulary, "codes": codes.astype(narrow)}


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text: the byte {content[error.start]:#04x} at offset "
            f"{error.start}; convert the file, or remove what is not text"
        ) from error
    if not text:
        raise DataError(f"{path}: the file is empty")
    return text
