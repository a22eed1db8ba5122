"""URLs of storages and data sets: what is one, and what one must not have."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# In the messages of libraries: a password before the host, and what signs an address.
_SECRETS = re.compile(r"(?<=://)[^/@\s'\"]+@|\?[^\s'\"<>]+")


def is_url(text: str) -> bool:
    """Return whether `text` is a URL and not the path of a folder."""
    return _SCHEME.match(text) is not None


def url_problem(url: str) -> str | None:
    """Return why `url` cannot name a folder of a storage, None if it can."""
    if not is_url(url):
        return (
            f"{url!r} must be a URL such as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or "
            "file:///FOLDER"
        )
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        return (
            f"{without_secrets(url)!r} must have no user, password, query or fragment; "
            "credentials belong into the environment or the configuration of the storage's library"
        )
    if not parts.netloc and not parts.path.strip("/"):
        return f"{url!r} must name a folder after {parts.scheme}://"
    return None


def without_secrets(text: str) -> str:
    """Return `text` with the credentials in all its URLs left out."""
    return _SECRETS.sub("", text)
