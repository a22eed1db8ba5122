"""Tokens by which a stream goes on: JSON that only the server reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from kfac_dist.errors import UsageError

_MAX_CHARACTERS = 64 * 1024


def encode(value: Any) -> str:
    """Return the token of a JSON value."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode(token: str, is_ours: Callable[[Any], bool]) -> Any:
    """Return the value of a token.

    Raises:
        UsageError: `encode` has not made it, or not of a value that `is_ours`.
    """
    try:
        if len(token) > _MAX_CHARACTERS:
            raise ValueError("too long")
        value = json.loads(base64.b64decode(token.encode(), b"-_", validate=True))
        if not is_ours(value):
            raise ValueError("not of ours")
    except (ValueError, RecursionError):
        raise UsageError("resume_token: not a token that this server gave") from None
    return value
