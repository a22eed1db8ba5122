"""The port of a job's metrics: what it serves while the job runs, and that it closes after."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from urllib.error import URLError

import pytest

from kfac_dist import train
from kfac_dist.config import parse_spec
from kfac_dist.errors import ConflictError, InvalidSpecError
from kfac_dist.runs import StepRecord
from tests.workers.whole_jobs.jobs import Jobs, line_spec
from tests.workers.whole_jobs.scraping import Samples, by_label, scrape, value
from workers.driver.records.metrics_server import HOST, metrics_server


def test_series_end_with_their_job_and_the_port_with_the_block() -> None:
    with metrics_server(0) as server:
        assert server is not None
        assert scrape(server.url) == {}
        with server.series("line-1"):
            assert value(scrape(server.url), "kfac_samples_total") == 0
        assert scrape(server.url) == {}
    with pytest.raises(URLError):
        scrape(server.url)


def test_a_port_in_use_is_a_conflict() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        message = f"metrics port: {port} on 127.0.0.1 is in use; .* 0 for a free one"
        with pytest.raises(ConflictError, match=message), metrics_server(port):
            pass


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(InvalidSpecError, match=f"metrics port .* 65535; got {port}"):
        train(line_spec(), run_dir=tmp_path / "run", metrics_port=port)
    assert not (tmp_path / "run").exists()


class Seen(Exception):  # noqa: N818 - ends the endless job of the test
    pass


def assert_is(found: Samples, record: StepRecord, earlier: list[StepRecord]) -> None:
    """Every series has the number of the last record, or the sum over all."""
    assert value(found, "kfac_step") == record.step
    assert value(found, "kfac_loss") == record.loss
    assert value(found, "kfac_damping") == record.damping
    assert value(found, "kfac_gamma") == record.gamma
    assert value(found, "kfac_update_norm") == record.update_norm
    assert value(found, "kfac_stale_applied_total") == record.stale_applied_total
    versions = by_label(found, "kfac_inverse_version_step", "layer")
    assert versions == record.inverse_version_step
    depths = by_label(found, "kfac_inverse_queue_depth", "worker")
    assert depths == record.inverse_queue_depth
    phases = by_label(found, "kfac_step_duration_seconds", "phase")
    assert phases == {"step": record.step_seconds, **record.phase_seconds}
    all_records = [*earlier, record]
    assert value(found, "kfac_samples_total") == sum(r.num_cases for r in all_records)
    inversions = [inversion for r in all_records for inversion in r.inversions]
    assert value(found, "kfac_inversion_duration_seconds_count") == len(inversions)
    seconds = sum(inversion.seconds for inversion in inversions)
    assert value(found, "kfac_inversion_duration_seconds_sum") == pytest.approx(seconds)
    assert by_label(found, "kfac_inversions_total", "result")["ok"] == len(inversions)


@pytest.mark.usefixtures("processes")
def test_a_job_that_loses_a_worker_is_scraped_at_every_step(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    scrapes: list[Samples] = []

    def look(record: StepRecord) -> None:
        assert server is not None
        scrapes.append(scrape(server.url))
        assert_is(scrapes[-1], record, jobs.records[:-1])
        if "inverse_worker_replaced" in jobs.kinds():
            raise Seen
        if record.step == 6:
            os.kill(jobs.pid("inverse_worker"), signal.SIGKILL)

    jobs.on_step = look
    spec = line_spec(
        steps=100_000, staleness={"max_steps": 20}, workers={"gradient": 1, "inverse": 2}
    )
    with metrics_server(0) as server, pytest.raises(Seen):
        jobs.run(parse_spec(spec), metrics=server)
    restarts = [value(s, "kfac_worker_restarts_total", role="inverse_worker") for s in scrapes]
    assert (restarts[0], restarts[-1]) == (0, 1)
    assert set(by_label(scrapes[-1], "kfac_inverse_version_step", "job")) == {
        jobs.run_folder().read_job().job
    }
    assert sum(len(record.inversions) for record in jobs.records) > 3
    stored = jobs.run_folder().read_metrics()
    assert [r.inversions for r in stored] == [r.inversions for r in jobs.records]
    assert server is not None
    told = jobs.run_folder().read_events()[0]
    assert (told.kind, told.details["url"]) == ("metrics_served", server.url)
