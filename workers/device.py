"""Which device each role computes on, and which backend carries its collectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kfac_dist.config import WorkersSpec
from kfac_dist.errors import InvalidSpecError

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Device of the gradient workers and the parameter server; inverse workers use the CPU.

    `gpus_per_member` is the share of a GPU that Ray reserves for each member, 0 on the CPU.
    """

    kind: Literal["cpu", "cuda"]
    backend: Backend
    gpus_per_member: float

    def device(self) -> torch.device:
        """Return this process's device."""
        # No index: Ray shows each process only the GPU that it was given.
        return torch.device(self.kind)


def plan_devices(workers: WorkersSpec, num_gpus: int) -> DevicePlan:
    """Choose device and backend for a cluster of `num_gpus` GPUs.

    NCCL needs one GPU for every member of the group. Members that share a GPU exchange through
    host memory with gloo.

    Raises:
        InvalidSpecError: `workers.device` is cuda and there is no GPU.
    """
    if workers.device == "cpu" or (workers.device == "auto" and num_gpus == 0):
        return DevicePlan(kind="cpu", backend="gloo", gpus_per_member=0.0)
    if num_gpus == 0:
        raise InvalidSpecError("workers.device: cuda was asked for, but this machine has no GPU")
    members = workers.gradient + 1
    if num_gpus >= members:
        return DevicePlan(kind="cuda", backend="nccl", gpus_per_member=1.0)
    share = 1.0 / math.ceil(members / num_gpus)
    return DevicePlan(kind="cuda", backend="gloo", gpus_per_member=share)
