import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.ledger import StatisticsLedger
from kfac_dist.errors import InvalidSpecError

Message = tuple[int, str]  # (step, its layers, a letter each)
LAYERS = "abcd"


@dataclass
class Holder:
    """Does what an inverse worker does with its ledger; messages stand for statistics."""

    ledger: StatisticsLedger
    held: list[Message] = field(default_factory=list)
    applied: list[tuple[int, str]] = field(default_factory=list)

    def receive(self, message: Message) -> None:
        if self.ledger.receive(*message) == "accepted":
            self.held.append(message)

    def apply(self) -> None:
        for step in self.ledger.complete_steps():
            # What is in several messages has the same sums in all; one of them is used.
            layers = sorted({layer for of, own in self.held if of == step for layer in own})
            self.applied.append((step, "".join(layers)))
            self.held = [message for message in self.held if message[0] > step]


def cut(layers: str, ends: Sequence[int]) -> list[str]:
    starts = sorted({0, *(end for end in ends if end < len(layers)), len(layers)})
    return [layers[a:b] for a, b in itertools.pairwise(starts)]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[str, list[Message]]:
    """Messages step by step, those of a step in any order, with losses and late duplicates."""
    layers = LAYERS[: draw(st.integers(1, len(LAYERS)))]
    messages: list[Message] = []
    for step in range(1, 9):
        parts = cut(layers, draw(st.lists(st.integers(1, len(LAYERS)), max_size=3)))
        for part in draw(st.permutations(parts)):
            if draw(st.integers(0, 5)):
                messages.append((step, part))
            if messages and draw(st.integers(0, 3)) == 0:
                messages.append(draw(st.sampled_from(messages)))
    return layers, messages


def whole_steps(layers: str, messages: list[Message]) -> list[int]:
    layers_of: dict[int, set[str]] = {}
    for step, own in messages:
        layers_of.setdefault(step, set()).update(own)
    return sorted(step for step, found in layers_of.items() if found == set(layers))


@given(deliveries(), st.data())
def test_each_step_that_arrived_whole_is_applied_exactly_once_and_in_order(
    drawn: tuple[str, list[Message]], data: st.DataObject
) -> None:
    layers, messages = drawn
    holder = Holder(StatisticsLedger(layers))
    for message in messages:
        holder.receive(message)
        if data.draw(st.booleans()):
            holder.apply()
    holder.apply()
    whole = whole_steps(layers, messages)
    assert holder.applied == [(step, layers) for step in whole]
    begun = {step for step, _ in messages if whole and step < whole[-1]}
    assert holder.ledger.dropped == len(begun - set(whole))
    assert holder.ledger.applied_step == (whole[-1] if whole else 0)
    assert {step for step, _ in holder.held} == {
        step for step, _ in messages if step > holder.ledger.applied_step
    }


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sets(st.sampled_from("abc"), min_size=1)), max_size=80)
)
def test_no_step_is_ever_applied_twice_whatever_comes(messages: list[tuple[int, set[str]]]) -> None:
    """Even if steps do not come in order, and their layers are divided in any way."""
    holder = Holder(StatisticsLedger("abc"))
    for step, layers in messages:
        holder.receive((step, "".join(sorted(layers))))
        holder.apply()
    steps = [step for step, _ in holder.applied]
    assert steps == sorted(set(steps))
    assert holder.applied == [(step, "abc") for step in steps]


@given(deliveries(), st.lists(st.integers(1, 3), max_size=3), st.data())
def test_a_restart_at_the_step_of_the_saved_statistics_applies_nothing_twice(
    drawn: tuple[str, list[Message]], ends: list[int], data: st.DataObject
) -> None:
    """After the restart everything is sent again, divided in another way."""
    layers, messages = drawn
    stop = data.draw(st.integers(0, len(messages)))
    holder = Holder(StatisticsLedger(layers))
    for message in messages[:stop]:
        holder.receive(message)
        if data.draw(st.booleans()):
            holder.apply()
    saved_step = holder.ledger.applied_step
    after = Holder(StatisticsLedger(layers, saved_step))
    for step in range(1, 9):
        for part in cut(layers, ends):
            after.receive((step, part))
        after.apply()
    assert after.applied == [(step, layers) for step in range(saved_step + 1, 9)]


def test_the_receipts() -> None:
    ledger = StatisticsLedger("ab", applied_step=4)
    assert ledger.receive(4, "a") == "late"
    assert ledger.receive(5, "a") == "accepted"
    assert ledger.receive(5, "a") == "duplicate"
    assert ledger.receive(6, "a") == "accepted"
    assert ledger.receive(6, "b") == "accepted"
    assert ledger.receive(6, "b") == "duplicate"
    assert ledger.receive(5, "b") == "late"
    assert (ledger.complete_steps(), ledger.dropped) == ((6,), 1)
    assert ledger.receive(6, "b") == "late"
    assert ledger.complete_steps() == ()


def test_a_step_that_is_repeated_may_divide_its_layers_in_another_way() -> None:
    ledger = StatisticsLedger("abc")
    assert ledger.receive(1, "ab") == "accepted"  # then a gradient worker died
    assert ledger.receive(1, "a") == "duplicate"
    assert ledger.complete_steps() == ()
    assert ledger.receive(1, "bc") == "accepted"
    assert ledger.complete_steps() == (1,)


def test_steps_that_are_wanted_later_are_left() -> None:
    ledger = StatisticsLedger("a")
    for step in (1, 2, 3):
        ledger.receive(step, "a")
    assert ledger.complete_steps(last_step=2) == (1, 2)
    assert ledger.applied_step == 2
    assert ledger.receive(3, "a") == "duplicate"
    assert ledger.complete_steps() == (3,)


def test_a_message_and_a_ledger_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidSpecError, match="step must be at least 1; got 0"):
        StatisticsLedger("ab").receive(0, "a")
    with pytest.raises(InvalidSpecError, match="applied_step must be at least 0; got -1"):
        StatisticsLedger("a", applied_step=-1)
