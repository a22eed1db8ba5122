"""What a dead process left behind is in the message; an unknown process id is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_dist.errors import WorkerDiedError
from tests.runs.samples import sample_run
from workers.driver.crew import failures
from workers.driver.crew.failures import Member, job_error

ACTOR = """\
import os, sys, types
from pathlib import Path
from workers.actor import role_log
job = types.SimpleNamespace(run_dir=Path(sys.argv[1]), attempt=1, job="x")
log = role_log(job, "gradient_worker", 0)
log.info("built")
import faulthandler
faulthandler.enable()
print("case 12 looks odd", flush=True)
child = os.fork()  # it ends by os._exit, as those of multiprocessing do
if child == 0:
    os._exit(3)
os.waitpid(child, 0)
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("ends", "part"),
    [
        ("os._exit(17)", "os._exit(17) was called at <string>:1"),
        (
            """
import torch
from workers.actor import logged
def step():
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
logged(log, "step 5", step)
""",
            "its GPU reported an error, so it ended itself with exit code 85",
        ),
        ("os.kill(os.getpid(), 11)", "it ended by a signal: Segmentation fault"),
        ("os.kill(os.getpid(), 9)", "the last that it printed: case 12 looks odd"),
    ],
)
def test_the_exit_code_or_signal_and_what_was_printed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, part: str
) -> None:
    with sample_run(tmp_path, steps=1) as folder:
        log = folder.places.log("gradient_worker", 0)
    subprocess.run([sys.executable, "-c", ACTOR, str(folder.path), ends], timeout=60, check=False)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert [event for event in events if event != "step 5"] == ["built"] + [
        "os._exit was called"
    ] * ("kill" not in ends)
    assert ("device-side assert" in log.read_text()) == ("85" in part)
    monkeypatch.setattr(failures, "is_death", lambda error: True)
    error = job_error(Member(role="gradient_worker", rank=0), RuntimeError("gone"), step=5, log=log)
    assert isinstance(error, WorkerDiedError)
    assert error.message.startswith("gradient worker 0 died at step 5; ")
    assert part in error.message
    assert error.first_failure is not None
    assert "case 12 looks odd" in error.first_failure.log_tail


def test_the_process_id_comes_from_ray_if_the_driver_does_not_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "is_death", lambda error: True)
    error = RuntimeError("The actor died.\n\tclass_name: A\n\tpid: 3831\n")
    member = Member(role="parameter_server", rank=0)
    said = job_error(member, error, step=0, log=tmp_path / "none.log").message
    assert said.startswith("parameter server 0 (pid 3831) died at step 0; ")
    assert "as after SIGKILL" in said
