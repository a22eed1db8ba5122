from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.coordination.steps.ledger import StatisticsLedger
from kfac_dist.errors import InvalidSpecError

Message = tuple[int, int]  # (step, rank)


@dataclass
class Holder:
    """Does what an inverse worker does with its ledger; messages stand for statistics."""

    ledger: StatisticsLedger
    held: list[Message] = field(default_factory=list)
    applied: list[list[Message]] = field(default_factory=list)

    def receive(self, message: Message) -> None:
        if self.ledger.receive(*message) == "accepted":
            self.held.append(message)

    def apply(self) -> None:
        steps = self.ledger.complete_steps()
        for step in steps:
            self.applied.append(sorted(m for m in self.held if m[0] == step))
        if steps:
            self.held = [m for m in self.held if m[0] > steps[-1]]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[Message]]:
    """Messages of ranks that each send in order, with losses, late duplicates, any interleaving."""
    num_ranks = draw(st.integers(1, 4))
    queues = []
    for rank in range(num_ranks):
        kept = [step for step in range(1, 9) if draw(st.integers(0, 5))]
        queues.append([(step, rank) for step in kept])
    messages: list[Message] = []
    while any(queues):
        messages.append(draw(st.sampled_from([q for q in queues if q])).pop(0))
        if draw(st.integers(0, 3)) == 0:
            messages.append(draw(st.sampled_from(messages)))
    return num_ranks, messages


def whole_steps(num_ranks: int, messages: list[Message]) -> list[int]:
    ranks_of: dict[int, set[int]] = {}
    for step, rank in messages:
        ranks_of.setdefault(step, set()).add(rank)
    return sorted(step for step, ranks in ranks_of.items() if len(ranks) == num_ranks)


@given(deliveries(), st.data())
def test_each_step_that_arrived_whole_is_applied_exactly_once_and_in_order(
    drawn: tuple[int, list[Message]], data: st.DataObject
) -> None:
    num_ranks, messages = drawn
    holder = Holder(StatisticsLedger(num_ranks))
    for message in messages:
        holder.receive(message)
        if data.draw(st.booleans()):
            holder.apply()
    holder.apply()
    whole = whole_steps(num_ranks, messages)
    assert holder.applied == [[(step, rank) for rank in range(num_ranks)] for step in whole]
    begun = {step for step, _ in messages if whole and step < whole[-1]}
    assert holder.ledger.dropped == len(begun - set(whole))
    assert holder.ledger.applied_step == (whole[-1] if whole else 0)
    assert {step for step, _ in holder.held} == {
        step for step, _ in messages if step > holder.ledger.applied_step
    }


@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), max_size=80))
def test_no_message_is_ever_applied_twice_whatever_comes(
    num_ranks: int, messages: list[Message]
) -> None:
    """Even if a rank does not send in order."""
    holder = Holder(StatisticsLedger(num_ranks))
    for step, rank in messages:
        holder.receive((step, rank % num_ranks))
        holder.apply()
    steps = [group[0][0] for group in holder.applied]
    assert steps == sorted(set(steps))
    assert holder.applied == [[(step, rank) for rank in range(num_ranks)] for step in steps]


@given(deliveries(), st.integers(1, 4), st.data())
def test_a_restart_at_the_step_of_the_saved_statistics_applies_nothing_twice(
    drawn: tuple[int, list[Message]], ranks_after: int, data: st.DataObject
) -> None:
    """After the restart everything is sent again, by another number of ranks."""
    num_ranks, messages = drawn
    stop = data.draw(st.integers(0, len(messages)))
    holder = Holder(StatisticsLedger(num_ranks))
    for message in messages[:stop]:
        holder.receive(message)
        if data.draw(st.booleans()):
            holder.apply()
    saved_step = holder.ledger.applied_step
    after = Holder(StatisticsLedger(ranks_after, saved_step))
    for step in range(1, 9):
        for rank in range(ranks_after):
            after.receive((step, rank))
        after.apply()
    steps = [group[0][0] for group in after.applied]
    assert steps == list(range(saved_step + 1, 9))


def test_the_receipts() -> None:
    ledger = StatisticsLedger(2, applied_step=4)
    assert ledger.receive(4, 0) == "late"
    assert ledger.receive(5, 0) == "accepted"
    assert ledger.receive(5, 0) == "duplicate"
    assert ledger.receive(6, 0) == "accepted"
    assert ledger.receive(6, 1) == "accepted"
    assert ledger.receive(6, 1) == "duplicate"
    assert ledger.receive(5, 1) == "late"
    assert (ledger.complete_steps(), ledger.dropped) == ((6,), 1)
    assert ledger.receive(6, 1) == "late"
    assert ledger.complete_steps() == ()


@pytest.mark.parametrize(
    ("step", "rank", "message"),
    [
        (0, 0, "step must be at least 1; got 0"),
        (1, 2, "rank must be between 0 and 1; got 2"),
        (1, -1, "rank must be between 0 and 1; got -1"),
    ],
)
def test_a_message_that_cannot_be_is_refused(step: int, rank: int, message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        StatisticsLedger(2).receive(step, rank)


def test_a_ledger_of_nobody_is_refused() -> None:
    with pytest.raises(InvalidSpecError, match="num_ranks must be at least 1; got 0"):
        StatisticsLedger(0)
    with pytest.raises(InvalidSpecError, match="applied_step must be at least 0; got -1"):
        StatisticsLedger(1, applied_step=-1)
