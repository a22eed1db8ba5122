"""How long a stream waits for a server, with a clock that the test advances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kfac_dist.errors import UnreachableError
from kfac_dist.service.client import streams
from kfac_dist.service.client.streams import Patience, resumed


class Away(grpc.RpcError):
    """The server does not answer."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "connection refused"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Opened:
    """A stream that gives `answers` and then breaks; without any it never opens."""

    def __init__(self, answers: list[str], *, ends: bool = False) -> None:
        self._answers = answers
        self._ends = ends

    def initial_metadata(self) -> None:
        if not self._answers and not self._ends:
            raise Away

    def is_active(self) -> bool:
        return True

    def cancel(self) -> None:
        """Nothing to do."""

    def __iter__(self) -> Iterator[Any]:
        for answer in self._answers:
            yield SimpleNamespace(resume_token=answer)
        if not self._ends:
            raise Away


class Clock:
    """Replaces the module `time`: sleeping takes no time and advances the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(streams, "time", made)
    return made


def test_a_server_that_has_answered_is_waited_for_and_the_wait_is_told_once(clock: Clock) -> None:
    told: list[str] = []

    def open_stream(token: str) -> Opened:
        if clock.now < 10_000 and token:
            return Opened([])
        return Opened(["second"], ends=True) if token else Opened(["first"])

    patience = Patience(seconds=math.inf, on_waiting=told.append)
    answers = [answer.resume_token for answer in resumed(open_stream, "host:1", patience)]
    assert answers == ["first", "second"]
    assert clock.now >= 10_000
    assert told == ["host:1: no answer from the server: connection refused"]


def test_a_server_that_has_never_answered_is_given_up_after_a_minute(clock: Clock) -> None:
    told: list[str] = []
    patience = Patience(seconds=math.inf, on_waiting=told.append)
    with pytest.raises(UnreachableError, match="host:1"):
        next(resumed(lambda _token: Opened([]), "host:1", patience))
    assert 60 <= clock.now < 70
    assert told == []


def test_a_limit_holds_after_answers_too(clock: Clock) -> None:
    stream = resumed(
        lambda token: Opened([] if token else ["first"]), "host:1", Patience(seconds=20.0)
    )
    assert next(stream).resume_token == "first"
    with pytest.raises(UnreachableError):
        next(stream)
    assert 20 <= clock.now < 25
