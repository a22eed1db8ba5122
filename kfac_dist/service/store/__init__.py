"""The database of the control plane: its tables, how to open it, and its queries."""

from kfac_dist.service.store.database import Store, open_store
from kfac_dist.service.store.models import (
    AttemptRow,
    EventRow,
    JobRow,
    PointRow,
    SeriesRow,
    TokenRow,
)

__all__ = [
    "AttemptRow",
    "EventRow",
    "JobRow",
    "PointRow",
    "SeriesRow",
    "Store",
    "TokenRow",
    "open_store",
]
