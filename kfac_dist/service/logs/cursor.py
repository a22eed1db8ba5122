"""How far a stream of logs has come, as a token that its reader hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.errors import UsageError
from kfac_dist.service import opaque_tokens
from kfac_dist.service.logs.files import LogFile


@dataclass(frozen=True, kw_only=True)
class LogCursor:
    """Bytes that were read, by name of the log file."""

    offsets: Mapping[str, int] = field(default_factory=dict)

    def encode(self, job_id: str) -> str:
        """Return the token; it is good for the logs of this job alone."""
        return opaque_tokens.encode([job_id, self.offsets])

    @classmethod
    def decode(cls, token: str, job_id: str) -> LogCursor:
        """Return the cursor of a token; of an empty one, the beginning.

        Raises:
            UsageError: it is no token that `encode` made, or one of another job.
        """
        if not token:
            return cls()
        job, offsets = opaque_tokens.decode("resume_token", token, _is_ours)
        if job != job_id:  # the logs have the same names, and its offsets would skip lines
            raise UsageError(f"resume_token: it is of the logs of job {job}, not of {job_id}")
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
