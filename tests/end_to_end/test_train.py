"""`kfac-dist train` on real Ray processes: success, resumption, an interrupt."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest
from safetensors.numpy import load_file

from kfac_dist.config import load_spec
from kfac_dist.core.vector import flatten
from tests.end_to_end.command import SPEC, CommandLine
from tests.waiting import wait_until
from tests.workers.whole_jobs.scraping import by_label, scrape, value
from tests.workers.whole_jobs.test_distributed_is_serial import serial_run

SHARED_MEMORY = Path("/dev/shm")


def all_tensors(run_dir: Path, step: int) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {
        f"{path.name}/{name}": array.tobytes()
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(path).items()
    }


def test_a_job_ends_with_one_json_object_and_a_complete_run_folder(command: CommandLine) -> None:
    running = command.train(command.spec(), "--set", "steps=30")
    titles = ["GradientWorker", "InverseWorker", "ParameterServer"]
    assert all(running.actor(title) for title in titles)
    code, summary, stderr = running.finish()
    assert code == 0, stderr
    assert summary["state"] == "SUCCEEDED"
    assert summary["step"] == 30
    assert summary["train"]["objective"] < summary["initial_objective"] / 2
    assert summary["inverse_staleness_steps"]["mean"] > 0
    assert summary["run_dir"] == str(running.run_dir)
    names = {path.name for path in running.run_dir.iterdir()}
    assert {"spec.yaml", "job.json", "metrics.jsonl", "events.jsonl", "report.html"} <= names
    assert json.loads((running.run_dir / "summary.json").read_text()) == summary
    steps = [record["step"] for record in running.lines("metrics.jsonl")]
    assert steps == list(range(1, 31))
    for record in running.lines("metrics.jsonl"):
        assert record["inverse_staleness_steps"]["max"] <= 8


def test_a_synchronous_job_is_the_serial_optimizer_and_survives_a_kill(
    command: CommandLine,
) -> None:
    text = SPEC.replace("max_steps: 8", "max_steps: 0") + "dtype: float64\n"
    spec = command.spec(text)
    straight = command.train(spec, run_dir="straight")
    assert straight.finish()[0] == 0
    serial, _ = serial_run(load_spec(spec), command.folder, 12)
    checkpoint = straight.run_dir / "checkpoints" / "step-00000012"
    trained = load_file(checkpoint / "parameter_server.safetensors")["parameters"]
    assert trained.tobytes() == flatten(serial._parameters).numpy().tobytes()

    killed = command.train(spec, "--set", "steps=100000", run_dir="killed")
    killed.wait_for_step(6)
    family = killed.family()
    killed.process.kill()
    killed.process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    newest = max((killed.run_dir / "checkpoints").glob("step-????????"))
    assert int(newest.name.removeprefix("step-")) >= 4
    for later in (killed.run_dir / "checkpoints").glob("step-*"):
        if int(later.name[5:13]) > 4:
            for path in later.iterdir():
                path.write_bytes(b"torn")

    code, summary, stderr = command.train(spec, "--resume", run_dir="killed").finish()
    assert code == 0, stderr
    assert summary["step"] == 12
    assert all_tensors(killed.run_dir, 12) == all_tensors(straight.run_dir, 12)
    assert [record["step"] for record in killed.lines("metrics.jsonl")][-8:] == list(range(5, 13))


def test_ctrl_c_ends_everything_within_five_seconds(command: CommandLine) -> None:
    before = set(SHARED_MEMORY.iterdir())
    running = command.train(command.spec(), "--set", "steps=100000")
    running.wait_for_step(5)
    family = running.family()
    started = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    code, _, stderr = running.finish(seconds=20)
    assert time.monotonic() - started < 5
    assert code == 130
    assert "Traceback" not in stderr
    _, alive = psutil.wait_procs(family, timeout=1)
    assert not alive
    assert set(SHARED_MEMORY.iterdir()) <= before
    assert json.loads((running.run_dir / "job.json").read_text())["state"] == "CANCELLED"


def test_a_job_is_scraped_while_it_runs(command: CommandLine) -> None:
    running = command.train(command.spec(), "--set", "steps=100000", "--metrics-port", "0")
    assert running.process.stderr is not None
    said = running.process.stderr.readline()
    url = said.removeprefix("metrics at ").strip()
    assert url.startswith("http://127.0.0.1:"), said
    running.wait_for_step(5)
    found = scrape(url)
    step = int(value(found, "kfac_step"))
    running.wait_for_step(step)
    records = running.lines("metrics.jsonl")[:step]
    assert value(found, "kfac_loss") == records[-1]["loss"]
    assert value(found, "kfac_samples_total") == sum(r["num_cases"] for r in records)
    versions = by_label(found, "kfac_inverse_version_step", "layer")
    assert versions == records[-1]["inverse_version_step"]
    inverted = sum(len(record["inversions"]) for record in records)
    assert value(found, "kfac_inversion_duration_seconds_count") == inverted > 0
    running.process.send_signal(signal.SIGINT)
    assert running.finish(seconds=20)[0] == 130
    with pytest.raises(URLError):
        scrape(url)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_baselines_run_on_the_same_workers(command: CommandLine, name: str) -> None:
    optimizer = SPEC.index("optimizer:"), SPEC.index("workers:")
    text = SPEC[: optimizer[0]] + f"optimizer: {{name: {name}}}\n" + SPEC[optimizer[1] :]
    code, summary, stderr = command.train(command.spec(text), "--set", "steps=40").finish()
    assert code == 0, stderr
    assert summary["train"]["objective"] < summary["initial_objective"]
    assert summary["inverse_staleness_steps"] in ({"mean": 0.0, "max": 0.0}, None)


def test_a_killed_inverse_worker_is_replaced_while_training_continues(
    command: CommandLine,
) -> None:
    running = command.train(command.spec(), "--set", "steps=100000")
    running.wait_for_step(5)
    running.actor("InverseWorker").kill()
    wait_until(lambda: "recovered" in running.events(), "recovery")
    assert {"inverse_worker_died", "inverse_worker_replaced"} <= set(running.events())
    seen = len(running.lines("metrics.jsonl"))
    running.wait_for_step(seen + 5)
    running.process.send_signal(signal.SIGINT)
    assert running.finish(seconds=20)[0] == 130


def test_a_killed_gradient_worker_ends_a_job_that_may_not_replace_it(command: CommandLine) -> None:
    running = command.train(
        command.spec(), "--set", "steps=100000", "--set", "faults.max_restarts=0"
    )
    running.wait_for_step(5)
    running.actor("GradientWorker").kill()
    code, summary, stderr = running.finish(seconds=30)
    assert code == 1
    assert summary["state"] == "FAILED"
    assert summary["reason"] == "worker_died"
    assert summary["first_failure"]["role"] == "gradient_worker"
    assert "Traceback" not in stderr
    last = summary["step"] + 2
    code, summary, stderr = command.train(
        command.spec(), "--resume", "--set", "steps=20000", "--set", f"steps={last}"
    ).finish()
    assert code == 0, stderr
    assert summary["step"] == last
