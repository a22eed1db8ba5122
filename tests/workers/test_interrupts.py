from __future__ import annotations

import os
import signal
import threading

import pytest

from workers.interrupts import Interrupts


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.requested
        interrupt()
        assert interrupts.requested
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_grace_period_ends():
    with Interrupts(grace_seconds=0.0) as interrupts:
        interrupts.check()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_other_threads_have_no_signals():
    def use() -> None:
        with Interrupts() as interrupts:
            interrupts.check()
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [True]
