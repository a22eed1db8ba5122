"""`kfac-dist replay` as a user types it, given the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.end_to_end.command import CommandLine
from tests.workers.whole_jobs.jobs import TASK

pytestmark = pytest.mark.timeout(600)
SPEC = """\
name: own
task: line.py:Line
task_args: {depth: 3}
data: {name: null}
steps: 16
batch_size: 20
optimizer: {name: kfac, damping: {initial: 1}, inverse_update_period: 4}
workers: {gradient: 1, inverse: 1}
staleness: {max_steps: 8}
checkpoint: {every_steps: 4}
"""


def parameters(run_dir: Path) -> bytes:
    checkpoint = run_dir / "checkpoints" / "step-00000016"
    return load_file(checkpoint / "parameter_server.safetensors")["parameters"].tobytes()


def last_line(stdout: str) -> dict[str, Any]:
    return json.loads(stdout.splitlines()[-1])  # the task prints its own lines before


def test_a_run_is_replayed_and_a_changed_record_is_found(command: CommandLine) -> None:
    (command.folder / "line.py").write_text(TASK)
    running = command.train(command.spec(SPEC))
    code, summary, stderr = running.finish(seconds=300)
    assert code == 0, stderr
    assert summary["inverse_staleness_steps"]["max"] > 0

    done = command.run("replay", "./run", "-o", "json", seconds=300)
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout) == {
        "job": summary["job"],
        "run_dir": str(command.folder / "run.replay"),
        "steps": 16,
        "identical": True,
        "first_difference": None,
        "checkpoint": 16,
        "stopped_at": None,
    }
    assert parameters(command.folder / "run.replay") == parameters(running.run_dir)

    path = running.run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    was, records[4]["loss"] = records[4]["loss"], records[4]["loss"] + 1
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = command.run("replay", running.run_dir, "--steps", "9", "-o", "json", seconds=300)
    assert done.returncode == 1
    facts = last_line(done.stdout)
    assert (facts["steps"], facts["identical"], facts["checkpoint"]) == (5, False, None)
    assert facts["run_dir"] == str(command.folder / "run.replay-2")
    assert facts["first_difference"] == {
        "step": 5,
        "field": "loss",
        "recorded": was + 1,
        "replayed": was,
    }
    message = json.loads(done.stderr)["error"]["message"]
    assert message.startswith("step 5: loss is ")
    assert "Traceback" not in done.stderr
