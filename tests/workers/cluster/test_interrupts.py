from __future__ import annotations

import signal
import threading

import pytest

from workers.cluster.interrupts import Interrupts, deferred


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_interrupt_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.grace_seconds = 60.0
        assert not interrupts.requested
        interrupt()
        assert interrupts.requested
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_without_grace_the_first_interrupt_raises_at_the_next_check():
    with Interrupts() as interrupts:
        interrupts.check()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_deferred_interrupt_takes_effect_at_the_end_of_the_block():
    done: list[str] = []

    def block() -> None:
        with deferred():
            interrupt()
            done.append("block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["block"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_other_threads_have_no_signals():
    def use() -> None:
        with Interrupts() as interrupts, deferred():
            interrupts.check()
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_the_end_of_the_terminal_is_an_interrupt_unless_it_is_ignored(number: signal.Signals):
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert interrupts.requested
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupts() as interrupts, deferred():
            signal.raise_signal(number)
            assert not interrupts.requested
    finally:
        signal.signal(number, before)
