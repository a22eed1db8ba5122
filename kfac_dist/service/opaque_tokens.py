"""Tokens that a client hands back unread: pages of a listing, and places in a stream.

A token is a JSON value in URL-safe base64. Clients may keep one for a long time, so its format
must stay readable.
"""

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


def decode(field: str, token: str, is_ours: Callable[[Any], bool]) -> Any:
    """Return the value of a token that came in the request's `field`.

    Raises:
        UsageError: `encode` did not make the token, or its value fails `is_ours`.
    """
    try:
        if len(token) > _MAX_CHARACTERS:
            raise ValueError("too long")
        padding = "=" * (-len(token) % 4)  # page tokens of earlier versions have none
        value = json.loads(base64.b64decode(f"{token}{padding}".encode(), b"-_", validate=True))
        if not is_ours(value):
            raise ValueError("not ours")
    except (ValueError, RecursionError):
        raise UsageError(
            f"{field}: not a token that this server gave; send the last one back unchanged"
        ) from None
    return value
