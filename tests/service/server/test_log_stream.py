"""StreamLogs over a real connection: following, resuming after a restart, many streams at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kfac_dist.errors import NotFoundError, UsageError
from kfac_dist.service.job_records import Job
from kfac_dist.service.server.serving import ServerOptions
from tests.service.requests import spec
from tests.service.serving import Serving, serving
from tests.waiting import wait_until

NUM_STREAMS = 200
NUM_LINES = 50
PATIENCE = 240.0  # seconds, for a machine that is busy with other tests


def log_dir(server: Serving, job: Job) -> Path:
    folder = server.jobs.log_dir(job.id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def append(folder: Path, name: str, text: str) -> None:
    with (folder / name).open("a") as file:
        file.write(text)


def test_logs_can_be_read_after_the_end(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, server.client() as client:
        job = client.submit(spec())
        append(log_dir(server, job), "driver-0.log", "one\ntwo\nlast")
        append(log_dir(server, job), "inverse_worker-0.log", "three\n")
        client.cancel(job.id)
        assert [line.text for line in client.logs(job.id, follow=True, roles=["driver"])] == [
            "one",
            "two",
            "last",
        ]
        assert [line.text for line in client.logs(job.id, tail_lines=1, ranks=[0])] == [
            "last",
            "three",
        ]
        with pytest.raises(NotFoundError):
            list(client.logs("none-such"))
        with pytest.raises(UsageError, match="tail_lines"):
            list(client.logs(job.id, tail_lines=-1))


def test_following_ends_with_the_job_and_misses_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, server.client() as client:
        job = client.submit(spec())
        folder = log_dir(server, job)
        got: list[str] = []

        def follow() -> None:
            got.extend(line.text for line in client.logs(job.id, follow=True))

        thread = threading.Thread(target=follow)
        thread.start()
        append(folder, "driver-0.log", "one\n")
        wait_until(lambda: got == ["one"], "the first line")
        append(folder, "driver-0.log", "tw")
        append(folder, "driver-0.log", "o\nlast")
        wait_until(lambda: got == ["one", "two"], "the second line")
        client.cancel(job.id)
        thread.join(30)
        assert got == ["one", "two", "last"]


def test_following_survives_a_restart_and_repeats_no_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    got: list[str] = []
    with serving(home) as server:
        client = server.client()
        job = client.submit(spec())
        folder = log_dir(server, job)
        lines = client.logs(job.id, follow=True)
        append(folder, "driver-0.log", "one\n")
        got.append(next(lines).text)
        port = int(server.address.rpartition(":")[2])
    append(folder, "driver-0.log", "two\n")
    with serving(home, ServerOptions(host="127.0.0.1", port=port)) as again:
        got.append(next(lines).text)
        again.jobs.cancel(job.id)
        got += [line.text for line in lines]
    client.close()
    assert got == ["one", "two"]


def test_a_tail_begins_where_it_was_requested_even_after_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home) as server:
        client = server.client()
        job = client.submit(spec())
        folder = log_dir(server, job)
        append(folder, "driver-0.log", "old\n")
        batches = client.logs(job.id, follow=True, tail_lines=0).batches
        assert next(batches).lines == []
        port = int(server.address.rpartition(":")[2])
    append(folder, "driver-0.log", "new\n")
    with serving(home, ServerOptions(host="127.0.0.1", port=port)) as again:
        again.jobs.cancel(job.id)
        assert [line.text for batch in batches for line in batch.lines] == ["new"]
    client.close()


@pytest.mark.timeout(600)
def test_two_hundred_streams_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, server.client() as client:
        job = client.submit(spec())
        folder = log_dir(server, job)
        append(folder, "driver-0.log", "first\n")
        opened = threading.Semaphore(0)

        def follow() -> list[str]:
            lines = client.logs(job.id, follow=True)
            got = [next(lines).text]
            opened.release()
            return got + [line.text for line in lines]

        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            followers = [pool.submit(follow) for _ in range(NUM_STREAMS)]
            for _ in followers:
                assert opened.acquire(timeout=PATIENCE)  # all are open at the same time
            threads_of_server = [t for t in threading.enumerate() if t.name.startswith("calls")]
            assert len(threads_of_server) < NUM_STREAMS / 4
            written = [f"line {number}" for number in range(NUM_LINES)]
            for line in written:
                append(folder, "driver-0.log", f"{line}\n")
            assert client.get(job.id).id == job.id  # other calls are answered meanwhile
            client.cancel(job.id)
            for follower in followers:
                assert follower.result(PATIENCE) == ["first", *written]
