"""What a group of members loses, who learns of it, and when that is too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kfac_dist.errors import KfacDistError, WorkerDiedError
from workers.driver.crew.failures import Member
from workers.driver.crew.healing import StepInHand
from workers.driver.crew.processes import GroupProcess

ChangeKind = Literal["member_died", "member_left", "member_joined"]
NoticeKind = Literal["members_awaited", "member_start_failed", "scale_waits"]


@dataclass(frozen=True, kw_only=True)
class GroupChange:
    """A change of the members, for records and people; it takes effect after `step`.

    `loses_buffers`: the model has buffers, and a gradient worker is gone with its own.
    """

    kind: ChangeKind
    member: Member
    step: int
    epoch: int
    num_workers: int
    num_shards: int
    is_degraded: bool
    in_hand: StepInHand
    loses_buffers: bool
    message: str


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Receives each change that was made, and what keeps others from being made."""

    on_change: Callable[[GroupChange], None]
    on_notice: Callable[[NoticeKind, str], None]


@dataclass(kw_only=True)
class Losses:
    """Members that are no longer in the next group, and why it is formed; `step` was the last one.

    `in_hand` is the step in which something was lost. `ended` are those of `leaving` whose process
    has been ended already. `num_cuts` counts losses of a connection that no member is to blame for.
    """

    cause: KfacDistError
    step: int
    dead: list[GroupProcess] = field(default_factory=list)
    leaving: list[GroupProcess] = field(default_factory=list)
    ended: list[GroupProcess] = field(default_factory=list)
    num_cuts: int = 0
    in_hand: StepInHand = field(default_factory=StepInHand)
    loses_buffers: bool = False

    @property
    def gone(self) -> list[GroupProcess]:
        """The members that are not in the next group."""
        return [*self.dead, *self.leaving]

    def answers(self, process: GroupProcess) -> bool:
        """Return whether a member can still be asked."""
        return process not in self.dead and process not in self.ended


def too_often(
    cause: KfacDistError, num_deaths: int, most: int, why: str | None = None
) -> KfacDistError:
    """Return `cause`, with the limit that keeps the job from continuing."""
    if not isinstance(cause, WorkerDiedError):
        return cause
    why = why or (
        f"members of the group were lost {num_deaths} times, faults.max_restarts is {most}"
    )
    return WorkerDiedError(f"{cause.message}; {why}", first_failure=cause.first_failure)
