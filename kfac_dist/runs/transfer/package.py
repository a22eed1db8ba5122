"""The user's code on its way to the cluster: a folder as a zip that is checked before unpacking.

A package holds only plain files below its root: no links, no devices, no name that leads out of
it. The checks protect the server's own files, not the cluster, where a job runs its user's code
anyway.
"""

from __future__ import annotations

import io
import secrets
import shutil
import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from kfac_dist.errors import InvalidSpecError
from kfac_dist.runs.transfer.package_contents import IGNORE_FILE, Contents, PackedFile, contents_of

MAX_PACKED_BYTES = 32 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20
MAX_FILES = 10_000

_EPOCH = (1980, 1, 1, 0, 0, 0)  # instead of a file's own time: equal files give equal packages
_CHUNK_BYTES = 2**20


def pack(folder: Path, contents: Contents | None = None) -> bytes:
    """Return `folder` as a package; `contents` says which files, by default `contents_of(folder)`.

    Raises:
        InvalidSpecError: the folder has too many files or bytes, or a file cannot be read.
    """
    contents = contents or contents_of(folder)
    _check_size(folder, sum(file.num_bytes for file in contents.packed), len(contents.packed))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in contents.packed:
            info = zipfile.ZipInfo(file.name, _EPOCH)
            info.external_attr = (stat.S_IFREG | (0o755 if file.is_executable else 0o644)) << 16
            archive.writestr(info, _read(folder, file), zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    if len(data) > MAX_PACKED_BYTES:
        raise InvalidSpecError(_too_large(f"{folder}: packed it has", len(data), MAX_PACKED_BYTES))
    return data


def _read(folder: Path, file: PackedFile) -> bytes:
    try:
        return (folder / file.name).read_bytes()
    except OSError as error:
        raise InvalidSpecError(
            f"{folder / file.name}: this file would be sent with the job and cannot be read: "
            f"{error.strerror}; leave it out with a line in {IGNORE_FILE}"
        ) from error


def check_package(data: bytes) -> None:
    """Check a package without unpacking it.

    Raises:
        InvalidSpecError: it is not a zip or is too large, or an entry is a link or leads out of it.
    """
    if len(data) > MAX_PACKED_BYTES:
        raise InvalidSpecError(_too_large("package: it has", len(data), MAX_PACKED_BYTES))
    with _open(data) as archive:
        _check_entries(archive)


def unpack(data: bytes, target: Path) -> None:
    """Write the files of a package into `target`, which must not exist yet.

    Raises:
        InvalidSpecError: as for `check_package`, or a file is damaged or larger than the zip's
            index says.
    """
    if len(data) > MAX_PACKED_BYTES:
        raise InvalidSpecError(_too_large("package: it has", len(data), MAX_PACKED_BYTES))
    with _open(data) as archive:
        entries = _check_entries(archive)
        target.mkdir(parents=True)
        for entry in entries:
            _write(archive, entry, target / entry.filename)


def unpack_whole(data: bytes, target: Path) -> None:
    """Unpack a package; after a kill `target` is either complete or missing.

    Raises:
        InvalidSpecError: as for `unpack`.
    """
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        unpack(data, temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_size(folder: Path, num_bytes: int, count: int) -> None:
    if count > MAX_FILES:
        raise InvalidSpecError(
            f"{folder}: the folder of the specification is sent to the cluster with the user's "
            f"code, and it has more than {MAX_FILES:,} files; move the specification and the code "
            f"to a folder of their own, or name what is not needed in {IGNORE_FILE}"
        )
    if num_bytes > MAX_UNPACKED_BYTES:
        raise InvalidSpecError(_too_large(f"{folder}: it has", num_bytes, MAX_UNPACKED_BYTES))


def _too_large(what: str, num_bytes: int, limit: int) -> str:
    return (
        f"{what} at least {num_bytes / 2**20:.1f} MiB, but at most {limit / 2**20:.0f} MiB of user "
        f"code can be sent; name what is not needed in {IGNORE_FILE} (submit --dry-run lists all "
        "files), or move the specification and the code to a folder of their own, and name the "
        "folder of data sets with --data-dir"
    )


def _open(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InvalidSpecError(f"package: not a zip file: {error}") from error


def _check_entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files of the archive, after checking every entry."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > MAX_FILES:
        raise InvalidSpecError(f"package: {len(entries):,} files; at most {MAX_FILES:,}")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_UNPACKED_BYTES:
        raise InvalidSpecError(_too_large("package: unpacked it has", total, MAX_UNPACKED_BYTES))
    paths = [_check_name(entry) for entry in entries]
    folders = {parent for path in paths for parent in path.parents}
    for path, count in Counter(paths).items():
        if count > 1 or path in folders:
            raise InvalidSpecError(
                f"package: {str(path)!r} occurs twice, or both as a file and a folder"
            )
    return entries


def _check_name(entry: zipfile.ZipInfo) -> PurePosixPath:
    name = entry.filename
    path = PurePosixPath(name)
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 when the zip was not made on Unix
    if kind not in (0, stat.S_IFREG):
        raise InvalidSpecError(
            f"package: {name!r} is a link or a device; a package may have only files"
        )
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise InvalidSpecError(f"package: {name!r} leads out of the package")
    if entry.flag_bits & 0x1:
        raise InvalidSpecError(f"package: {name!r} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidSpecError(f"package: {name!r} must be stored or compressed with deflate")
    return path


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Write one file, counting its bytes: the size in the zip's index may be wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    try:
        with archive.open(entry) as source, path.open("xb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise InvalidSpecError(f"package: {entry.filename!r} is larger than it says")
                file.write(chunk)
        if entry.external_attr >> 16 & stat.S_IXUSR:
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InvalidSpecError(f"package: {entry.filename!r} is damaged: {error}") from error
