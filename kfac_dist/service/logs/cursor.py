"""How far a stream of logs has come, as a token that its reader hands back."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.errors import UsageError
from kfac_dist.service.logs.files import LogFile

_MAX_TOKEN_CHARACTERS = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class LogCursor:
    """Bytes that were read, by name of the log file."""

    offsets: Mapping[str, int] = field(default_factory=dict)

    def encode(self) -> str:
        """Return the token."""
        text = json.dumps(self.offsets, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode()

    @classmethod
    def decode(cls, token: str) -> LogCursor:
        """Return the cursor of a token; of an empty one, the beginning.

        Raises:
            UsageError: it is no token that `encode` made.
        """
        if not token:
            return cls()
        try:
            if len(token) > _MAX_TOKEN_CHARACTERS:
                raise ValueError("too long")
            offsets = json.loads(base64.b64decode(token.encode(), b"-_", validate=True))
            if not _are_offsets(offsets):
                raise ValueError("no offsets")
        except (ValueError, binascii.Error, RecursionError):
            raise UsageError("resume_token: not a token that this server gave") from None
        return cls(offsets=offsets)


def _are_offsets(value: object) -> bool:
    return isinstance(value, dict) and all(
        LogFile.named(name) is not None and type(offset) is int and 0 <= offset < 2**63
        for name, offset in value.items()
    )
