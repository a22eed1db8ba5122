"""The table of errors on the wire covers the tree of errors."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from kfac_dist import errors
from kfac_dist.errors import KfacDistError
from kfac_dist.service.wire.status import CODES, FieldError, code_of, to_status


def tree(kind: type[KfacDistError]) -> list[type[KfacDistError]]:
    below = [found for child in kind.__subclasses__() for found in tree(child)]
    return [kind, *below]


CLASSES = [kind for kind in tree(KfacDistError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not KfacDistError])
def test_every_error_has_its_own_code_or_that_of_its_base(kind: type[KfacDistError]) -> None:
    code = code_of(kind("x"))
    assert code is not grpc.StatusCode.INTERNAL
    assert any(base in CODES for base in kind.__mro__)


@pytest.mark.parametrize("kind", CODES)
def test_the_details_name_the_class(kind: type[KfacDistError]) -> None:
    status = to_status(kind("what, where"))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("kfac_dist", kind.__name__)
    assert (status.message, status.code) == ("what, where", CODES[kind].value[0])


def test_the_details_name_a_wrong_field() -> None:
    status = to_status(FieldError("job_id", "is empty"))
    assert status.message == "job_id: is empty"
    bad = error_details_pb2.BadRequest()
    assert len(status.details) == 2
    assert status.details[1].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == ["job_id"]
