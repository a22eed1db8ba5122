"""What a process tells of its work: phases, waits and notices."""

from __future__ import annotations

import threading

from workers.heartbeat import IDLE, Heartbeat, beat, waiting
from workers.phases import Phases


def test_phases_and_waits_of_the_working_thread_are_told() -> None:
    heartbeat, phases = Heartbeat(), Phases()
    with heartbeat.doing("step", 5):
        with phases("compute"):
            pulse = heartbeat.pulse()
            assert (pulse.doing, pulse.step, pulse.waits) == ("step: compute", 5, False)
            with waiting():
                assert heartbeat.pulse().waits
            assert not heartbeat.pulse().waits
        assert heartbeat.pulse().doing == "step"
        beat("more")
        assert heartbeat.pulse().doing == "step: more"
    assert (heartbeat.pulse().doing, heartbeat.pulse().step) == (IDLE, 0)


def test_the_time_begins_anew_with_each_phase() -> None:
    heartbeat, advanced = Heartbeat(), threading.Event()
    with heartbeat.doing("step", 1):
        advanced.wait(0.05)
        before = heartbeat.pulse().seconds
        heartbeat.beat("next")
        assert heartbeat.pulse().seconds < before


def test_other_threads_are_not_heard() -> None:
    heartbeat = Heartbeat()
    with heartbeat.doing("step", 1):
        thread = threading.Thread(target=lambda: beat("of another member"))
        thread.start()
        thread.join()
        assert heartbeat.pulse().doing == "step"
    with waiting():  # outside `doing` nobody listens
        beat("nothing")
    heartbeat.note_preemption()
    assert heartbeat.pulse().preempted
