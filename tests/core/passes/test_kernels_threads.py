"""Passes in forward mode exclude each other: its level is one for the process."""

import threading

from torch import nn

from kfac_dist.core.passes.kernels import plain_kernels


def test_one_thread_at_a_time_is_inside():
    model, inside, order = nn.Linear(2, 2), threading.Event(), []

    def other():
        inside.set()
        with plain_kernels(model):
            order.append("other")

    thread = threading.Thread(target=other)
    with plain_kernels(model), plain_kernels(model):
        thread.start()
        assert inside.wait(30)
        thread.join(0.2)
        order.append("first")
    thread.join(30)
    assert order == ["first", "other"]
