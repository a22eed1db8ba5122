"""Pages of a listing of jobs, newest first, that stay correct while jobs are added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Select, func, select

from kfac_dist.errors import UsageError
from kfac_dist.service import opaque_tokens
from kfac_dist.service.store import JobRow

MAX_PAGE_SIZE = 1000

# Selecting columns is several times as fast as selecting JobRow entities.
_LISTED = [column for column in JobRow.__table__.columns if column.key not in ("spec", "summary")]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Filters of a listing; an empty sequence or None does not filter."""

    states: Sequence[str]
    owner: str | None
    name: str | None

    def query(self, page_size: int, page_token: str) -> Select[Any]:
        """Return the query for one page, plus one job that shows whether another page follows.

        Its rows have the columns of JobRow except specification and summary.

        Raises:
            UsageError: the size is out of range, or the token is from another listing.
        """
        if not 1 <= page_size <= MAX_PAGE_SIZE:
            raise UsageError(f"page_size: {page_size} is not between 1 and {MAX_PAGE_SIZE}")
        query = self._filtered(select(*_LISTED))
        query = query.order_by(JobRow.number.desc()).limit(page_size + 1)
        return query.where(JobRow.number < self._read(page_token)) if page_token else query

    def count(self) -> Select[Any]:
        """Return the query for the number of jobs on all pages."""
        return self._filtered(select(func.count(JobRow.number)))

    def _filtered(self, query: Select[Any]) -> Select[Any]:
        if self.states:
            query = query.where(JobRow.state.in_(self.states))
        if self.owner is not None:
            query = query.where(JobRow.owner == _without_nul("owner", self.owner))
        if self.name is not None:
            query = query.where(JobRow.name == _without_nul("name", self.name))
        return query

    def token(self, last: int) -> str:
        """Return the token of the page after the job numbered `last`."""
        return opaque_tokens.encode([last, self._digest()])

    def _digest(self) -> str:
        listing = asdict(self) | {"states": sorted(self.states)}
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:12]

    def _read(self, token: str) -> int:
        last, digest = opaque_tokens.decode("page_token", token, _is_page)
        if digest != self._digest():
            raise UsageError(
                "page_token: from a listing with other filters; keep the filters of the first page"
            )
        return int(last)


def _is_page(value: object) -> bool:
    match value:
        case [int() as last, str()]:
            return 0 < last < 2**63
    return False


def _without_nul(field: str, value: str) -> str:
    if "\x00" in value:  # PostgreSQL refuses it
        raise UsageError(f"{field}: must not contain a NUL character")
    return value
