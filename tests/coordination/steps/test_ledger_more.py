"""The ledger of an inverse worker that takes over from a dead one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.ledger import StatisticsLedger


def caught_up() -> StatisticsLedger:
    ledger = StatisticsLedger("ab", applied_step=2, catches_up=True)
    for step, layers in [(6, "ab"), (4, "a"), (3, "ab"), (5, "ab")]:
        assert ledger.receive(step, layers) == "accepted"
    return ledger


def test_nothing_is_whole_before_it_is_known_what_to_expect() -> None:
    ledger = caught_up()
    assert ledger.complete_steps() == ()
    ledger.expect([3, 4, 5])
    assert ledger.complete_steps() == (3,)
    assert ledger.receive(4, "b") == "accepted"
    assert ledger.complete_steps() == (4, 5, 6)
    assert ledger.dropped == 0


def test_steps_that_are_lost_are_dropped() -> None:
    ledger = caught_up()
    ledger.expect([3, 5])
    assert ledger.complete_steps() == (3, 5, 6)
    assert (ledger.dropped, ledger.receive(4, "b")) == (1, "late")


@given(st.permutations([(step, layer) for step in range(3, 8) for layer in "ab"]), st.data())
def test_steps_that_are_sent_again_are_applied_in_order_however_they_come(
    messages: list[tuple[int, str]], data: st.DataObject
) -> None:
    ledger = StatisticsLedger("ab", applied_step=2, catches_up=True)
    told_before = data.draw(st.integers(0, len(messages)))
    applied: list[int] = []
    for number, (step, layer) in enumerate(messages):
        if number == told_before:
            ledger.expect(range(1, 8))
        assert ledger.receive(step, layer) == "accepted"
        applied += ledger.complete_steps()
    if told_before == len(messages):
        ledger.expect(range(1, 8))
        applied += ledger.complete_steps()
    assert applied == [3, 4, 5, 6, 7]
