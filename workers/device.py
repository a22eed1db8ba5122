"""Which device each role computes on, and which backend carries its collectives (docs/gpu.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kfac_dist.config import WorkersSpec
from kfac_dist.errors import InvalidSpecError

Backend = Literal["gloo", "nccl"]
Kind = Literal["cpu", "cuda"]

# What an inverse worker reserves of a GPU that it shares with members: as good as nothing, but Ray
# then places it on a node with a GPU. All of them together reserve at most the second number, less
# than half, so that two members of an NCCL group still do not fit on one GPU.
_TOKEN_SHARE = 0.001
_MOST_TOKENS = 0.4
_RAY_STEP = 1e4  # Ray counts GPUs in steps of a ten-thousandth


DEVICE_LOST_EXIT = 85
"""The exit code of a process whose GPU has reported an error (docs/gpu.md)."""

# Errors of CUDA's libraries, which have no type of their own.
_CUDA_ERRORS = ("CUDA error", "cuDNN error", "cusolver error", "cuBLAS error")


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Devices of the members of the group (gradient workers, parameter server), and of inverses.

    Attributes:
        gpus_per_member: the share of a GPU that Ray reserves for each member, 0 on the CPU.
        gpus_per_inverse_worker: the same for each inverse worker.
        inverse_shares: inverse workers use the GPUs of the members, and give way to them.
    """

    kind: Kind
    backend: Backend
    gpus_per_member: float
    inverse_kind: Kind = "cpu"
    gpus_per_inverse_worker: float = 0.0
    inverse_shares: bool = False

    def device(self, index: int | None) -> torch.device:
        """Return the device of a member whose process was given the GPU `index` of those it sees.

        `index` is None where the process was given no GPU.
        """
        return _device(self.kind, index)

    def inverse_device(self, rank: int, index: int | None) -> torch.device:
        """Return the device of the inverse worker `rank`; `index` as for `device`."""
        if self.inverse_kind == "cuda" and self.inverse_shares:
            # Ray packs small shares onto one GPU. All GPUs of the node are visible, so they are
            # taken in turn instead.
            return torch.device("cuda", rank % torch.cuda.device_count())
        return _device(self.inverse_kind, index)


def _device(kind: Kind, index: int | None) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    assert index is not None, "Ray gives a GPU to every actor that reserves a share of one"
    return torch.device("cuda", index)


def plan_devices(workers: WorkersSpec, num_gpus: int) -> DevicePlan:
    """Choose devices and backend for a cluster of `num_gpus` GPUs.

    NCCL needs one GPU for every member of the group. Members that share a GPU exchange through
    host memory with gloo.

    Raises:
        InvalidSpecError: `workers.device` or `workers.inverse_device` is cuda and there is no GPU.
    """
    for key, device in (("device", workers.device), ("inverse_device", workers.inverse_device)):
        if device == "cuda" and num_gpus == 0:
            raise InvalidSpecError(
                f"workers.{key}: cuda was asked for, but this machine has no GPU; use auto or cpu"
            )
    members = _plan_members(workers, num_gpus)
    used = 0 if members.kind == "cpu" else min(num_gpus, workers.num_processes_of_group)
    return _plan_inverses(workers, members, num_gpus - used)


def _plan_members(workers: WorkersSpec, num_gpus: int) -> DevicePlan:
    if workers.device == "cpu" or num_gpus == 0:
        return DevicePlan(kind="cpu", backend="gloo", gpus_per_member=0.0)
    members = workers.num_processes_of_group
    if num_gpus >= members:
        # A shard in the process of a gradient worker would be a second NCCL member on one GPU.
        backend: Backend = "gloo" if workers.has_colocated_shards else "nccl"
        return DevicePlan(kind="cuda", backend=backend, gpus_per_member=1.0)
    share = 1.0 / math.ceil(members / num_gpus)
    return DevicePlan(kind="cuda", backend="gloo", gpus_per_member=share)


def _plan_inverses(workers: WorkersSpec, members: DevicePlan, num_spare: int) -> DevicePlan:
    """Return the plan with the inverse workers; `num_spare` GPUs are not used by members."""
    if workers.inverse_device == "cpu":
        return members
    if num_spare > 0:
        share = 1.0 / math.ceil(workers.inverse / num_spare)
        return replace(members, inverse_kind="cuda", gpus_per_inverse_worker=_floor(share))
    if workers.inverse_device == "auto":
        return members
    token = _floor(min(_TOKEN_SHARE, _MOST_TOKENS / workers.inverse))
    left = members.gpus_per_member * (1.0 - token * workers.inverse)
    return replace(
        members,
        gpus_per_member=_floor(left),
        inverse_kind="cuda",
        gpus_per_inverse_worker=token,
        inverse_shares=True,
    )


def _floor(share: float) -> float:
    return math.floor(share * _RAY_STEP) / _RAY_STEP


def visible_index(given: Sequence[str], visible: str | None) -> int | None:
    """Return which of the GPUs that a process sees is the one that it was given, None without one.

    Args:
        given: the ids of the GPUs that Ray gave to the process.
        visible: its CUDA_VISIBLE_DEVICES, None where it sees all.
    """
    if not given:
        return None
    return visible.split(",").index(given[0]) if visible else int(given[0])


def is_device_lost(error: BaseException) -> bool:
    """Return whether a GPU has reported an error after which this process cannot use it any more.

    Most of these errors stay: every later call fails as well. A full memory is not one of them.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(_CUDA_ERRORS)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make `device` that of this thread inside the block.

    Kernels of a GPU go to a stream of the lowest priority of its own, so that those of members
    that share the GPU, by MPS or in this process, come first.
    """
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_device(device)  # one setting for each thread
    lowest = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(lowest):
        yield
