"""Two control planes on one machine, each with a cluster of its own: neither sees the other's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest

from kfac_dist import Client
from kfac_dist.coordination.lifecycle import ENDED, JobState
from kfac_dist.errors import NotFoundError
from kfac_dist.service.access.local import read_local_token, read_server
from tests.end_to_end.command import SPEC, CommandLine
from tests.end_to_end.server import PATIENCE, Server
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        running = []
        for name in ("one", "two"):
            running.append(Server(CommandLine(tmp_path_factory.mktemp(name))))
            stack.callback(running[-1].end)
        yield running


def drivers(job: str) -> list[psutil.Process]:
    """The processes that run an attempt of a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "driver" in words and any(word.endswith(f"runs/{job}") for word in words):
            found.append(process)
    return found


def client_of(server: Server) -> Client:
    """A client as the server's own user has one."""
    home = server.command.folder / "home"
    local = read_server(home)
    assert local is not None
    return Client(local.address, token=read_local_token(home))


def cluster_of(server: Server) -> str:
    facts = json.loads((server.command.folder / "home/ray/head.json").read_text())
    return str(facts["gcs_address"])


def test_both_run_a_job_at_once_and_neither_sees_the_others(servers: list[Server]) -> None:
    one, two = servers
    assert cluster_of(one) != cluster_of(two)
    with client_of(one) as first, client_of(two) as second:
        spec = one.command.spec(SPEC)
        ours, theirs = (c.submit(spec, overrides=["steps=100000"]).id for c in (first, second))

        def trains(client: Client, job: str) -> bool:
            (listed,) = client.jobs()
            assert listed.id == job
            assert listed.state not in ENDED, listed
            return listed.step >= 1

        wait_until(lambda: trains(first, ours), "the first job trains", PATIENCE)
        wait_until(lambda: trains(second, theirs), "the second job trains", PATIENCE)
        for job, server, other in ((ours, one, two), (theirs, two, one)):
            (driver,) = drivers(job)
            assert cluster_of(server) in driver.cmdline()  # it was sent to its server's cluster
            assert cluster_of(other) not in driver.cmdline()
        for client, foreign in ((first, theirs), (second, ours)):
            with pytest.raises(NotFoundError):
                client.get(foreign)

        # What ends one leaves the other alone.
        first.cancel(ours, now=True)
        assert first.wait(ours, timeout_seconds=PATIENCE).state is JobState.CANCELLED
        one.end()
        reached = second.get(theirs).step
        wait_until(lambda: second.get(theirs).step > reached, "more steps", PATIENCE)
        assert [attempt.number for attempt in second.attempts(theirs)] == [1]
