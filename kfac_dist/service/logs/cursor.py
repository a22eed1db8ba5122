"""The position of a reader in a run's logs, as a token that the reader sends back to continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.errors import UsageError
from kfac_dist.service import opaque_tokens
from kfac_dist.service.logs.files import LogFile


@dataclass(frozen=True, kw_only=True)
class LogCursor:
    """How many bytes of each log have been read, by the file's name."""

    offsets: Mapping[str, int] = field(default_factory=dict)

    def encode(self, job_id: str) -> str:
        """Return the cursor as a token, which is valid only for the logs of this job."""
        return opaque_tokens.encode([job_id, self.offsets])

    @classmethod
    def decode(cls, token: str, job_id: str) -> LogCursor:
        """Return the cursor in a token; an empty token is the beginning.

        Raises:
            UsageError: `encode` did not make the token, or made it for another job.
        """
        if not token:
            return cls()
        job, offsets = opaque_tokens.decode("resume_token", token, _is_ours)
        if job != job_id:  # logs of all jobs have the same names: its offsets would skip lines
            raise UsageError(f"resume_token: belongs to the logs of job {job}, not of {job_id}")
        return cls(offsets=offsets)


def _is_ours(value: object) -> bool:
    match value:
        case [str(), dict() as offsets]:
            return _are_offsets(offsets)
    return False


def _are_offsets(offsets: dict[str, object]) -> bool:
    return all(
        LogFile.named(name) is not None and type(offset) is int and 0 <= offset < 2**63
        for name, offset in offsets.items()
    )
