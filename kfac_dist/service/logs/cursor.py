"""How far a stream of logs has come, as a token that its reader hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.service import resume_token
from kfac_dist.service.logs.files import LogFile


@dataclass(frozen=True, kw_only=True)
class LogCursor:
    """Bytes that were read, by name of the log file."""

    offsets: Mapping[str, int] = field(default_factory=dict)

    def encode(self) -> str:
        """Return the token."""
        return resume_token.encode(self.offsets)

    @classmethod
    def decode(cls, token: str) -> LogCursor:
        """Return the cursor of a token; of an empty one, the beginning.

        Raises:
            UsageError: it is no token that `encode` made.
        """
        return cls(offsets=resume_token.decode(token, _are_offsets)) if token else cls()


def _are_offsets(value: object) -> bool:
    return isinstance(value, dict) and all(
        LogFile.named(name) is not None and type(offset) is int and 0 <= offset < 2**63
        for name, offset in value.items()
    )
