"""Parsing records of a run folder; an error names the damaged file and field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kfac_dist.errors import KfacDistError

_Record = TypeVar("_Record", bound=BaseModel)


def read_whole(model: type[_Record], path: Path) -> _Record:
    """Read a file that holds one record.

    Raises:
        KfacDistError: the file is damaged; the message names file and field.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise KfacDistError(f"{path}: is damaged: {_first(error)}") from error


def parse_record(model: type[_Record], values: Mapping[str, Any], path: Path) -> _Record:
    """Parse one record of the journal in `path`.

    Raises:
        KfacDistError: the record is damaged; the message names file and field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise KfacDistError(f"{path}: has a record that is damaged: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    details = error.errors()[0]
    return f"{'.'.join(str(key) for key in details['loc'])}: {details['msg']}"
