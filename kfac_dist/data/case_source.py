"""What a task asks of a data set of vectors or images, whatever the data set."""

from __future__ import annotations

from typing import Protocol

from kfac_dist.data.dataset import BatchedDataset, Split


class CaseSource(Protocol):
    """A named data set. Files are read when a method asks for them, and not before."""

    @property
    def name(self) -> str:
        """Its name in a specification."""
        ...

    def case_shape(self) -> tuple[int, ...]:
        """The shape of one input: (channels, height, width) or (features,)."""
        ...

    def num_classes(self) -> int:
        """How many classes the labels tell apart; InvalidSpecError when there are no labels."""
        ...

    def reconstruction(self, split: Split) -> BatchedDataset:
        """Cases `[N, features]` that are their own targets; images are flattened, in [0, 1]."""
        ...

    def classification(self, split: Split) -> BatchedDataset:
        """Cases `[N, *case_shape]` with int64 labels; InvalidSpecError when there are none."""
        ...
