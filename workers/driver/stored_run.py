"""The copy of a run in the `storage` of its specification: where a run comes from, and goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kfac_dist.config import JobSpec
from kfac_dist.errors import NotFoundError, UnreachableError
from kfac_dist.runs import JobSummary, RunFolder, RunIdentity
from kfac_dist.runs.run_places import RunPlaces
from kfac_dist.runs.transfer.remote import RemoteFolder
from kfac_dist.runs.transfer.restore import refuse_stored, restore_run
from kfac_dist.runs.transfer.storage import StorageMirror
from workers.driver.records.journal import JobJournal

Finish = Callable[[JobSummary, float], JobSummary]
"""Uploads the rest within some seconds, and returns the summary with what is not up."""

_AWAY = "storage_unreachable"
_MOST_NAMED = 5


class OpenedRun(NamedTuple):
    """A run folder, with what its journal should say of how it was opened, as kind and message."""

    folder: RunFolder
    resumes: bool
    events: tuple[tuple[str, str], ...]


def storage_of(spec: JobSpec, identity: RunIdentity | None) -> RemoteFolder | None:
    """Return the place of a run in the storage of its specification, None without one."""
    if spec.storage is None:
        return None
    return RemoteFolder(spec.storage).below(spec.name if identity is None else identity.job)


def open_run(
    path: Path,
    spec: JobSpec,
    storage: RemoteFolder | None,
    *,
    resume: bool,
    identity: RunIdentity | None,
) -> OpenedRun:
    """Open the run in `path`, or create it; a run to resume that is not there is fetched first.

    An attempt of a server begins at the first step if neither the folder nor the storage has a
    run.

    Raises:
        NotFoundError: there is no run to resume, or all of its checkpoints in the storage are
            damaged.
        ConflictError: the folder or the storage holds another run.
        UnreachableError: the storage does not answer, and the run has to come from there.
        UsageError: the library for the storage is missing.
    """
    events: list[tuple[str, str]] = []
    if resume and storage is not None and not RunPlaces(path).has_run:
        refused = restore_run(storage, path)
        if refused is not None:
            events += [("checkpoint_refused", message) for message in refused]
            events.append(("restored", f"the run folder was fetched from {storage.url}"))
        elif identity is None:
            raise NotFoundError(
                f"no run to resume, neither in {path} nor in {storage.url}; leave out --resume to "
                "start one"
            )
        else:
            resume = False
    if resume:
        return OpenedRun(RunFolder.resume(path, spec), True, tuple(events))
    if storage is not None:
        try:
            refuse_stored(storage)
        except UnreachableError as error:
            events.append((_AWAY, f"{error.message}; it is tried again until the job ends"))
    return OpenedRun(RunFolder.create(path, spec, identity), False, tuple(events))


@contextmanager
def mirrored(
    opened: OpenedRun, storage: RemoteFolder | None, attempt: int, journal: JobJournal
) -> Iterator[Finish]:
    """Mirror the run folder to the storage inside the block, if there is one.

    What the journal should say of the opening is written first.
    """
    for kind, message in opened.events:
        journal.event(kind, message, severity="warning")
    if storage is None:
        yield lambda summary, _seconds: summary
        return
    folder, is_away = opened.folder, any(kind == _AWAY for kind, _ in opened.events)
    mirror = StorageMirror(
        folder.places, storage, attempt, journal.warn_later, is_unreachable=is_away
    )

    def finish(summary: JobSummary, seconds: float) -> JobSummary:
        missing = mirror.finish(seconds)
        if not missing:
            return summary
        summary = summary.model_copy(update={"not_stored": missing})
        folder.write_summary(summary)
        journal.event("not_stored", _in_words(missing, storage), severity="warning")
        return summary

    mirror.start()
    try:
        yield finish
    finally:
        mirror.finish(0.0)


def _in_words(missing: list[str], storage: RemoteFolder) -> str:
    named = ", ".join(missing[:_MOST_NAMED])
    rest = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    return f"not in {storage.url}, or not in the newest state: {named}{rest}"
