"""The arrays of an npz file: never unpickled, and mapped from the file where possible."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kfac_dist.errors import DataError, DataNotFoundError

_DAMAGED = (ValueError, EOFError, zlib.error, zipfile.BadZipFile)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry; its end: lengths of name and extra


class Header(NamedTuple):
    """Shape and type of an array, and `data_offset`, where its values begin in its npy stream."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    data_offset: int


@dataclass(frozen=True, kw_only=True)
class NpzFile:
    """The npz file at `path`. Its methods raise DataError if it cannot be read."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of the arrays, in the order of the file."""
        with self._open() as archive:
            return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]

    def header(self, name: str) -> Header:
        """Return shape and type of the array `name`, without reading its values."""
        try:
            with self._open() as archive, archive.open(f"{name}.npy") as stream:
                version = npy.read_magic(stream)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, is_fortran, dtype = read(stream)
                offset = stream.tell()
        except _DAMAGED as error:
            raise DataError(f"{self.path}: {name} is not an array: {error}") from error
        if dtype.hasobject:
            raise DataError(
                f"{self.path}: {name} holds Python objects, which are never unpickled; "
                "save it as an array of numbers"
            )
        return Header(shape, is_fortran, dtype, offset)

    def array(self, name: str) -> NDArray[Any]:
        """Return the array `name`, writable without changing the file.

        It is mapped if the file has it uncompressed, and otherwise unpacked into memory.
        """
        header, entry = self.header(name), self._entry(name)
        if entry.compress_type == zipfile.ZIP_STORED and 0 not in header.shape:
            return np.memmap(
                self.path,
                dtype=header.dtype,
                mode="c",
                offset=self._start(entry) + header.data_offset,
                shape=header.shape,
                order="F" if header.is_fortran else "C",
            )
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                array: NDArray[Any] = arrays[name]
        except _DAMAGED as error:
            raise DataError(f"{self.path}: {name} cannot be read: {error}") from error
        return array

    def is_mapped(self, name: str) -> bool:
        """Return whether `array` maps the array `name`, row after row."""
        header = self.header(name)
        is_stored = self._entry(name).compress_type == zipfile.ZIP_STORED
        return is_stored and not header.is_fortran and 0 not in header.shape

    def _entry(self, name: str) -> zipfile.ZipInfo:
        with self._open() as archive:
            return archive.getinfo(f"{name}.npy")

    def _start(self, entry: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        return int(entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise DataError(f"{self.path}: not an npz file: {error}") from error
        except OSError as error:
            raise DataNotFoundError(f"{self.path}: cannot be read: {error.strerror}") from error
