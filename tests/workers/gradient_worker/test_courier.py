"""Deliveries are made in order, beside the caller; their errors are not lost."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import wait_until
from workers.gradient_worker.courier import Courier


def test_deliveries_keep_their_order_and_do_not_hold_up_the_caller():
    courier, may_deliver, delivered = Courier(), threading.Event(), []
    courier.deliver(lambda: delivered.append(may_deliver.wait(30)))
    for number in (2, 3):
        courier.deliver(lambda number=number: delivered.append(number))
    assert delivered == []
    may_deliver.set()
    courier.finish()
    assert delivered == [True, 2, 3]


def test_what_a_delivery_raised_is_raised_at_the_next_one():
    def fail() -> None:
        raise ValueError("the post office is closed")

    courier, delivered = Courier(), []
    courier.deliver(fail)
    wait_until(lambda: courier._open[0].done(), "the failure")
    with pytest.raises(ValueError, match="closed"):
        courier.deliver(lambda: delivered.append(1))
    assert delivered == []
    courier.deliver(fail)
    with pytest.raises(ValueError, match="closed"):
        courier.finish()
