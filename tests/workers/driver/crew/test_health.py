"""Who is stopped, who hangs, and who only waits; the answers come from Ray's object store."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from kfac_dist.config.job import FaultSpec
from tests.waiting import wait_until
from workers.driver.crew import health
from workers.driver.crew.failures import Member
from workers.driver.crew.health import Health, patience_seconds
from workers.heartbeat import IDLE, Pulse

FAULTS = FaultSpec(stall_seconds=0.2, step_seconds=5.0)
WORKER = Member(role="gradient_worker", rank=1)
SERVER = Member(role="parameter_server", rank=0)
FINE = Pulse(pid=7, doing="step: compute", step=3, seconds=0.1, waits=False, preempted=False)

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(autouse=True)
def asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PERIOD_SECONDS", 0.0)


@ray.remote(num_cpus=0)
def never() -> None:
    time.sleep(1000)


def answering(pulse: Pulse) -> Any:
    return SimpleNamespace(pulse=SimpleNamespace(remote=lambda: ray.put(pulse)))


def judged(watched: Health) -> health.Stall:
    """Wait until one member stalls."""
    (stall,) = wait_until(watched.stalls, "a stall")
    return stall


def test_work_that_does_not_advance_hangs_and_who_waits_for_it_does_not() -> None:
    watched = Health(FAULTS)
    watched.ask(
        {
            WORKER: answering(replace(FINE, seconds=6.0)),
            SERVER: answering(replace(FINE, doing="step: reduce", seconds=7.0, waits=True)),
            Member(role="gradient_worker", rank=0): answering(
                replace(FINE, doing=IDLE, seconds=900.0)
            ),
        }
    )
    stall = judged(watched)
    assert stall.member == WORKER
    assert "its work, 'step: compute', did not advance for 6 s" in stall.why
    assert watched.suspect() == stall


def test_a_process_that_answered_once_and_then_is_silent_is_stopped() -> None:
    watched, silent = Health(FAULTS), never.remote()
    watched.ask({WORKER: answering(FINE), SERVER: answering(FINE)})
    wait_until(lambda: len(watched.pulses()) == 2, "two answers")
    assert watched.stalls() == []
    watched.ask(
        {
            WORKER: SimpleNamespace(pulse=SimpleNamespace(remote=lambda: silent)),
            SERVER: answering(FINE),
        }
    )
    stall = judged(watched)
    assert stall.member == WORKER
    assert "did not answer for 0 s" in stall.why
    watched.forget(WORKER)
    assert watched.stalls() == []
    ray.cancel(silent, force=True)


def test_a_driver_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_ABSENT_SECONDS", -1.0)
    watched, late = Health(FAULTS), never.remote()
    watched.ask({WORKER: answering(FINE)})
    wait_until(watched.pulses, "an answer")
    watched.ask({WORKER: SimpleNamespace(pulse=SimpleNamespace(remote=lambda: late))})
    first, *_ = watched._open.values()
    wait_until(lambda: time.monotonic() > first.asked_seconds + 0.3, "the limit")
    assert watched.stalls() == []
    ray.cancel(late, force=True)


def test_notices_and_the_patience_of_members() -> None:
    watched = Health(FAULTS)
    watched.ask({WORKER: answering(replace(FINE, preempted=True)), SERVER: answering(FINE)})
    wait_until(lambda: watched.preempted() == [WORKER], "the notice")
    assert patience_seconds(FAULTS) > FAULTS.step_seconds
    assert patience_seconds(FaultSpec(stall_seconds=900.0)) > 900.0
