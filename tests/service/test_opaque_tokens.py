"""Tokens that clients hand back: what was encoded is decoded, anything else is refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.errors import UsageError
from kfac_dist.service import opaque_tokens

values = st.lists(st.integers() | st.text(st.characters(exclude_categories=["Cs"])), max_size=4)


@given(values)
def test_a_token_gives_its_value_back_with_and_without_padding(value: list[object]) -> None:
    token = opaque_tokens.encode(value)
    for given_back in (token, token.rstrip("=")):
        assert opaque_tokens.decode("page_token", given_back, lambda _: True) == value


@pytest.mark.parametrize(
    "token",
    [
        "not base64",
        "é",
        "A" * 100_000,
        base64.urlsafe_b64encode(b"not JSON").decode(),
        base64.urlsafe_b64encode(b"[" * 20_000).decode(),
    ],
)
def test_what_encode_did_not_make_is_refused(token: str) -> None:
    with pytest.raises(UsageError, match="resume_token: not a token that this server gave"):
        opaque_tokens.decode("resume_token", token, lambda _: True)


def test_a_value_of_another_kind_is_refused() -> None:
    token = opaque_tokens.encode([1, 2])
    with pytest.raises(UsageError, match="page_token: not a token that this server gave"):
        opaque_tokens.decode("page_token", token, lambda value: isinstance(value, str))
