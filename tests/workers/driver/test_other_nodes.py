"""User code and logs cross nodes: here one node that takes itself for another than the driver's."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from kfac_dist.config import parse_spec
from kfac_dist.errors import InvalidSpecError
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import TASK, line_spec
from workers.actor import enter_code_folder, role_log
from workers.driver.other_nodes import other_nodes
from workers.exchange.messages import JobContext
from workers.this_node import attempt_folder, node_id, on_this_node


class Printer:
    """Does with its files what the actors of the roles do."""

    def __init__(self, job: JobContext) -> None:
        self.job = on_this_node(job)
        self.log = role_log(self.job, "gradient_worker", 0)

    def enter(self) -> tuple[str, str, str, str]:
        enter_code_folder(self.job)
        sys.stdout.write("entered\n")
        sys.stdout.flush()
        self.log.info("entered")
        assert self.job.data_dir is not None
        return (
            str(Path.cwd()),
            Path("line.py").read_text(),
            Path("words.txt").read_text(),
            str((self.job.data_dir / "x.npz").resolve()),
        )

    def die(self) -> None:
        sys.stdout.write("the last words\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path) -> JobContext:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/line.py").write_text(TASK)
    (tmp_path / "code/words.txt").write_text("beside the task")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.npz").write_bytes(b"numbers")
    (tmp_path / "run/logs").mkdir(parents=True)
    return JobContext(
        job="line-1",
        attempt=2,
        spec=parse_spec(line_spec()),
        base_dir=tmp_path / "code",
        data_dir=None,
        cache_dir=tmp_path / "cache",
        run_dir=tmp_path / "run",
    )


def test_code_reaches_another_node_and_its_last_words_reach_the_driver(
    cluster: None, job: JobContext, tmp_path: Path
) -> None:
    logs = tmp_path / "run/logs"
    folder = attempt_folder("line-1", 2, node_id())
    home = tmp_path / "node-home"
    actor: Any = ray.remote(runtime_env={"env_vars": {"KFAC_DIST_HOME": str(home)}})(Printer)
    url = f"file://{tmp_path}/data"
    with other_nodes(job, url, are_possible=True) as (sent, catch_up):
        assert sent.delivery is not None
        away = replace(sent, delivery=replace(sent.delivery, driver_node="another"))
        printer = actor.remote(away)
        where, code, words, data = ray.get(printer.enter.remote())
        assert (where, code, words) == (str(folder / "code"), TASK, "beside the task")
        assert Path(data).is_relative_to(home / "data/fetched")
        printed = logs / "gradient_worker-0.a2.out"
        wait_until(lambda: printed.exists() and "entered" in printed.read_text(), "the log")
        assert '"entered"' in (logs / "gradient_worker-0.a2.log").read_text()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(printer.die.remote())
        catch_up()
        assert printed.read_text().splitlines()[-1] == "the last words"
        assert printed.read_text() == (folder / "logs/gradient_worker-0.a2.out").read_text()
    assert not folder.parent.exists()
    assert not (tmp_path / "run/code").exists()


def test_the_drivers_own_node_keeps_its_paths(cluster: None, job: JobContext) -> None:
    with other_nodes(job, None, are_possible=True) as (sent, _):
        assert on_this_node(sent) == sent
    with other_nodes(job, None, are_possible=False) as (alone, _):
        assert alone is job


def test_code_that_cannot_be_sent_is_refused(cluster: None, job: JobContext) -> None:
    (job.base_dir / ".kfacdistignore").write_text("line.py\n")
    refused = pytest.raises(InvalidSpecError, match=r"line\.py would not be sent to the cluster")
    with refused, other_nodes(job, None, are_possible=True):
        pass
