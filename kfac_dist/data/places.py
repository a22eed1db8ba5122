"""Where the files of data sets are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.errors import DataNotFoundError


@dataclass(frozen=True, kw_only=True)
class Places:
    """`data_dir` is what the user gave, `cache_dir` comes after it and takes downloads."""

    data_dir: Path | None
    cache_dir: Path

    def folders(self, *patterns: str) -> list[Path]:
        """Both places, and after each one its subfolders that match `patterns`, in that order.

        Raises DataNotFoundError when `data_dir` is not a folder.
        """
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise DataNotFoundError(
                f"data folder {self.data_dir} (--data-dir or KFAC_DIST_DATA) is not a folder"
            )
        roots = [self.cache_dir] if self.data_dir is None else [self.data_dir, self.cache_dir]
        return [
            folder
            for root in roots
            for folder in (root, *(f for p in patterns for f in sorted(root.glob(p)) if f.is_dir()))
        ]

    def find(
        self, data: str, *, folders: Sequence[str], names: Sequence[str], patterns: Sequence[str]
    ) -> Path:
        """The file of the data set `data`: one of `names`, or the only one that fits `patterns`.

        Raises DataNotFoundError when there is none, or when several fit in one folder.
        """
        places = self.folders(*folders)
        for folder in places:
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        for folder in places:
            fitting = sorted(path for p in patterns for path in folder.glob(p) if path.is_file())
            if len(fitting) > 1:
                found = ", ".join(path.name for path in fitting)
                raise DataNotFoundError(
                    f"{data}: which file of {folder} is meant: {found}? Call it {names[0]}, or "
                    "give a folder with only one of them"
                )
            if fitting:
                return fitting[0]
        wanted = " or ".join([*names, *patterns])
        raise DataNotFoundError(self.ways(data, wanted, folders[0]))

    def ways(self, data: str, wanted: str, folder: str) -> str:
        """Say how the files `wanted` of `data` can be provided; no line feed at the end."""
        given = "not given" if self.data_dir is None else f"{self.data_dir}: not there"
        return (
            f"{data}: {wanted} was not found. Ways to provide it:\n"
            f"  1. --data-dir DIR with it in DIR or DIR/{folder} ({given})\n"
            f"  2. the same folder in KFAC_DIST_DATA, or the cache {self.cache_dir / folder}"
        )
