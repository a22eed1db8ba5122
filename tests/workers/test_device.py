"""Which device each process of a job computes on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.config import WorkersSpec
from kfac_dist.errors import InvalidSpecError
from workers.device import DevicePlan, computing_on, plan_devices, visible_index


def planned(num_gpus: int, **workers: object) -> DevicePlan:
    return plan_devices(WorkersSpec.model_validate(workers), num_gpus)


def test_without_a_gpu_everything_is_on_the_cpu():
    plan = planned(0)
    assert (plan.kind, plan.backend, plan.inverse_kind) == ("cpu", "gloo", "cpu")
    assert (plan.gpus_per_member, plan.gpus_per_inverse_worker) == (0.0, 0.0)
    assert plan.device(None) == plan.inverse_device(3, None) == torch.device("cpu")


@pytest.mark.parametrize("key", ["device", "inverse_device"])
def test_a_gpu_that_is_not_there_is_refused_by_key(key):
    with pytest.raises(InvalidSpecError, match=rf"workers\.{key}: cuda .* has no GPU; use auto"):
        planned(0, **{key: "cuda"})


def test_inverse_workers_share_what_the_members_leave_over():
    plan = planned(5, gradient=2, inverse=3)  # three members
    assert (plan.backend, plan.gpus_per_member) == ("nccl", 1.0)
    assert (plan.inverse_kind, plan.inverse_shares) == ("cuda", False)
    assert plan.gpus_per_inverse_worker == 0.5
    assert plan.inverse_device(0, 4) == torch.device("cuda", 4)


@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_auto_inverts_on_the_cpu_where_no_gpu_is_left_over(num_gpus):
    plan = planned(num_gpus, gradient=2, inverse=3)
    assert plan.kind == "cuda"
    assert (plan.inverse_kind, plan.gpus_per_inverse_worker) == ("cpu", 0.0)
    assert plan.inverse_device(1, None) == torch.device("cpu")


def test_all_gpus_are_left_over_by_members_on_the_cpu():
    plan = planned(2, device="cpu", inverse=2)
    assert (plan.kind, plan.gpus_per_member) == ("cpu", 0.0)
    assert (plan.inverse_kind, plan.gpus_per_inverse_worker) == ("cuda", 1.0)
    assert planned(2, device="cpu", inverse_device="cpu").inverse_kind == "cpu"


@given(st.integers(1, 9), st.integers(1, 900), st.integers(1, 9))
def test_inverse_workers_fit_beside_members_wherever_ray_puts_them(gradient, inverse, num_gpus):
    plan = planned(num_gpus, gradient=gradient, inverse=inverse, inverse_device="cuda")
    members = gradient if gradient > 2 else gradient + 1  # more than two have the shards in them
    assert plan.inverse_kind == "cuda"
    if not plan.inverse_shares:
        assert num_gpus > members
        a_gpu = int(1 / plan.gpus_per_inverse_worker + 1e-6)
        assert a_gpu * (num_gpus - members) >= inverse
        return
    tokens = inverse * plan.gpus_per_inverse_worker
    assert plan.gpus_per_inverse_worker > 0
    on_one = math.ceil(members / num_gpus)
    # Also if all inverse workers come first, and Ray packs them onto one GPU.
    assert on_one * plan.gpus_per_member + tokens <= 1 + 1e-9
    if plan.backend == "nccl":
        assert plan.gpus_per_member > 0.5  # no two members on one GPU


def test_workers_that_share_the_gpus_of_members_take_them_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    plan = planned(2, gradient=1, inverse=3, inverse_device="cuda")
    devices = [plan.inverse_device(rank, 0) for rank in range(3)]
    assert [device.index for device in devices] == [0, 1, 0]


@pytest.mark.parametrize(
    ("given_ids", "visible", "index"),
    [
        ([], None, None),
        ([], "0,1", None),
        (["3"], None, 3),
        (["3"], "2,3", 1),
        (["GPU-b"], "GPU-a,GPU-b", 1),
        (["1"], "1", 0),  # Ray has hidden the others
    ],
)
def test_the_gpu_that_ray_gave_is_found_among_those_that_are_visible(given_ids, visible, index):
    assert visible_index(given_ids, visible) == index


def test_nothing_is_set_for_the_cpu():
    with computing_on(torch.device("cpu")):
        assert torch.ones(2).device.type == "cpu"
