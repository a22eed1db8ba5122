"""The folders in which the files of data sets are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.errors import DataNotFoundError


@dataclass(frozen=True, kw_only=True)
class Places:
    """The folders of one job: `data_dir`, which the user names, then `cache_dir`, for downloads."""

    data_dir: Path | None
    cache_dir: Path

    def folders(self, *patterns: str) -> list[Path]:
        """Return both folders, each followed by its subfolders that match `patterns`.

        Raises DataNotFoundError if `data_dir` is not a folder.
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
        """Return the file of the data set `data`.

        Args:
            data: the name of the data set, for messages.
            folders: patterns of subfolders to look in, too.
            names: of the file, the preferred first.
            patterns: of a file of another name, if it is the only one that fits in its folder.

        Raises:
            DataNotFoundError: no file fits, or several in one folder do.
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
                    f"{data}: several files in {folder} fit: {found}. Rename the right one to "
                    f"{names[0]}, or name a folder with only one of them"
                )
            if fitting:
                return fitting[0]
        wanted = " or ".join([*names, *patterns])
        raise DataNotFoundError(self.explain_missing(data, wanted, folders[0]))

    def explain_missing(self, data: str, wanted: str, folder: str) -> str:
        """Return a message that says how to provide the files `wanted` of `data`."""
        given = "not given" if self.data_dir is None else f"not in {self.data_dir}"
        return (
            f"{data}: {wanted} was not found. Ways to provide it:\n"
            f"  1. --data-dir DIR with it in DIR or DIR/{folder} ({given})\n"
            f"  2. the same folder in KFAC_DIST_DATA, or the cache {self.cache_dir / folder}"
        )
