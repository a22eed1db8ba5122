"""Members with one role or two: real groups, windows of steps, and the errors of either role."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_dist.config import JobSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.errors import UserTaskError
from tests.workers.whole_jobs.jobs import TASK
from tests.workers.whole_jobs.local_job import (
    CPU,
    HOST,
    LocalJob,
    chain_spec,
    in_threads,
    job_context,
    user_spec,
)
from workers.exchange.messages import MemberReport, Rendezvous, StepOrder
from workers.exchange.process_group import Group, PeerLostError, host_store, join_group, join_store
from workers.gradient_worker.build import build_gradient_work
from workers.member.roles import MemberRoles
from workers.parameter_server.build import ShardBuilder
from workers.planning import step_schedule

NUM_CASES = 64


def adam_spec(folder: Path, num_workers: int, **task_args: Any) -> JobSpec:
    workers = {"gradient": num_workers}
    spec = user_spec(folder, TASK, "Line", task_args=task_args, workers=workers)
    values = spec.model_dump() | {"optimizer": {"name": "adam", "lr": 0.01}}
    return JobSpec.model_validate(values)


def orders(spec: JobSpec, count: int) -> list[StepOrder]:
    found, cursor, schedule = [], SamplerCursor(epoch=0, offset=0), step_schedule(spec)
    for step in range(1, count + 1):
        window, cursor = next_window(cursor, spec.batch_size, NUM_CASES)
        found.append(StepOrder(plan=schedule.plan(step), window=window))
    return found


def roles_of(job: LocalJob) -> list[MemberRoles]:
    """The work of a job, as members of which the first have both roles."""
    pairs = max(len(job.workers), len(job.shards))
    workers = [*job.workers, *[None] * (pairs - len(job.workers))]
    shards = [*job.shards, *[None] * (pairs - len(job.shards))]
    return [MemberRoles(w, s) for w, s in zip(workers, shards, strict=True)]


def built(spec: JobSpec, folder: Path, num_shards: int) -> list[MemberRoles]:
    """Members of a first-order job: both roles in one, where there are enough shards."""
    context = job_context(spec, folder)
    workers = [
        build_gradient_work(context, rank, CPU, _nothing) for rank in range(spec.workers.gradient)
    ]
    builder = ShardBuilder(context, CPU, 20.0, _nothing)
    shards = [builder.build(number, num_shards) for number in range(num_shards)]
    shards += [None] * (len(workers) - num_shards)
    return [MemberRoles(w, s) for w, s in zip(workers, shards, strict=True)]


def _nothing(_: Any) -> None:
    """A first-order optimizer sends nothing to inverse workers."""


def join(
    roles: Sequence[MemberRoles], epoch: int = 1, timeout_seconds: float = 20.0, step: int = 0
) -> None:
    store = host_store(HOST, timeout_seconds)
    num_workers = sum(member.worker is not None for member in roles)
    meet = Rendezvous(
        host=HOST,
        port=store.port,
        epoch=epoch,
        num_gradient_workers=num_workers,
        step=step,
        num_shards=sum(member.shard is not None for member in roles),
        timeout_seconds=timeout_seconds,
    )

    def one(rank: int) -> Group:
        own = join_store(meet)
        return join_group(meet, own, rank=rank, own_host=HOST, backend="gloo", device=CPU)

    shards = [member for member in roles if member.shard is not None]
    worker_ranks = {id(m): n for n, m in enumerate(m for m in roles if m.worker is not None)}
    shard_ranks = {id(m): num_workers + n for n, m in enumerate(shards)}
    in_threads(
        [
            lambda m=m: m.join(one, worker_ranks.get(id(m), 0), shard_ranks.get(id(m), 0), step)
            for m in roles
        ]
    )


def run(roles: Sequence[MemberRoles], window: Sequence[StepOrder]) -> list[list[MemberReport]]:
    return in_threads([lambda member=member: member.run(window) for member in roles])


def test_members_with_both_roles_equal_members_with_one(tmp_path: Path) -> None:
    """Three windows of steps of K-FAC, against a job whose roles are members of their own."""
    optimizer = {"inverse": "ekfac"}
    spec = chain_spec(tmp_path, optimizer=optimizer, workers={"gradient": 3, "inverse": 2})
    apart, together = LocalJob(spec, tmp_path), LocalJob(spec, tmp_path)
    try:
        reports = apart.steps(9)
        roles = roles_of(together)
        assert all(member.worker and member.shard for member in roles)
        join(roles, epoch=2)
        todo = orders(spec, 9)
        found = [run(roles, window) for window in (todo[:1], todo[1:3], todo[3:])]
        assert torch.equal(together.parameters, apart.parameters)
        by_step = [own for window in found for own in window[0]]
        assert [own.shard.decision.loss for own in by_step] == [report.loss for report in reports]
        for window in found:
            assert all(report.worker and report.shard for own in window for report in own)
    finally:
        apart.close()
        together.close()


def test_a_member_without_a_shard_and_one_without_a_worker_report_what_they_did(
    tmp_path: Path,
) -> None:
    spec = adam_spec(tmp_path, 2)
    first, second = built(spec, tmp_path, 1)
    dedicated = MemberRoles(None, first.shard)
    roles = [MemberRoles(first.worker, None), second, dedicated]
    join(roles)
    window = orders(spec, 3)
    reports = run(roles, window)
    assert all(r.worker is not None and r.shard is None for own in reports[:2] for r in own)
    assert all(r.worker is None and r.shard is not None for r in reports[2])
    assert [r.shard.step for r in reports[2]] == [1, 2, 3]


def errors_of(roles: Sequence[MemberRoles], windows: Sequence[Sequence[StepOrder]]) -> list:
    def one(member: MemberRoles, window: Sequence[StepOrder]) -> Exception | None:
        try:
            member.run(window)
        except (UserTaskError, PeerLostError, AssertionError) as error:
            return error
        return None

    return in_threads([lambda m=m, w=w: one(m, w) for m, w in zip(roles, windows, strict=True)])


def test_an_error_of_the_worker_ends_its_shard_at_once_and_is_the_one_that_is_raised(
    tmp_path: Path,
) -> None:
    roles = built(adam_spec(tmp_path, 3), tmp_path, 1)
    broken = adam_spec(tmp_path, 3, breaks_after=2)
    roles[0] = MemberRoles(built(broken, tmp_path, 1)[0].worker, roles[0].shard)
    join(roles, timeout_seconds=60.0)
    started = time.monotonic()
    window = orders(broken, 5)
    first, *others = errors_of(roles, [window] * 3)
    assert time.monotonic() - started < 20
    assert isinstance(first, UserTaskError), "not the echo of it in the shard of the same member"
    assert "no such column" in str(first)
    assert [type(error) for error in others] == [PeerLostError, PeerLostError]


def test_an_error_of_the_shard_ends_its_worker_at_once_and_is_the_one_that_is_raised(
    tmp_path: Path,
) -> None:
    spec = adam_spec(tmp_path, 3)
    roles = built(spec, tmp_path, 1)
    join(roles, timeout_seconds=60.0)
    window = orders(spec, 4)
    without_lr = [*window[:2], replace(window[2], plan=replace(window[2].plan, lr=None))]
    started = time.monotonic()
    first, *others = errors_of(roles, [without_lr, window, window])
    assert time.monotonic() - started < 20
    assert isinstance(first, AssertionError)
    assert "has an lr in every step" in str(first)
    assert [type(error) for error in others] == [PeerLostError, PeerLostError]


def test_members_that_have_left_meet_again_in_a_new_group(tmp_path: Path) -> None:
    spec = adam_spec(tmp_path, 2)
    roles, undisturbed = built(spec, tmp_path, 1), built(spec, tmp_path, 1)
    window = orders(spec, 6)
    join(undisturbed)
    run(undisturbed, window)
    join(roles)
    run(roles, window[:3])
    for member in roles:
        member.leave()
    with pytest.raises(PeerLostError, match="has been left"):
        roles[1].run(window[3:4])
    join(roles, epoch=2, step=3)
    run(roles, window[3:])
    parameters = [own[0].shard.shard.state.parameters for own in (roles, undisturbed)]
    assert torch.equal(*parameters)
