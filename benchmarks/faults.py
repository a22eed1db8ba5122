"""What happens to a job whose processes are killed or stopped, role by role and moment by moment?

A small job is run by the command line, as a user runs it, once undisturbed and once for each role,
signal and moment. An attempt that ends is resumed, as a server would do it; only the end of the
driver may end one. Told are the time from the signal to the next step that was applied, the number
of resumes, how far the final parameters are from the undisturbed run's, and what is left behind:
processes, folders and shared memory. The exit code is 1 if a case does not end SUCCEEDED, was
resumed or leaves something behind where it must not, or differs: a synchronous run must end at the
same parameters, except that the statistics of a dead inverse worker since the last checkpoint are
lost.

    python benchmarks/faults.py --out benchmarks/results
    python benchmarks/faults.py --short
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import add_output_options, deliver, document, surroundings, table
from safetensors.numpy import load_file

STEPS, MIDDLE, CHECKPOINT = 24, 12, 8
STALL_SECONDS = 4.0
LIMIT = 1e-9
ROLES = ("gradient_worker", "parameter_server", "inverse_worker", "driver")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
MOMENTS = ("start", "first step", "middle", "checkpoint", "evaluation", "last step")
_AFTER_RECORD = {
    "middle": MIDDLE,
    "checkpoint": CHECKPOINT,
    "evaluation": STEPS,
    "last step": STEPS - 1,
}
_MARK = "KFAC_FAULTS_CASE"
_TITLES = {
    "gradient_worker": "ray::GradientWorker",
    "parameter_server": "ray::ParameterServer",
    "inverse_worker": "ray::InverseWorker",
}
_MOST_RESUMES = 3
_CASE_SECONDS = 400.0
_CLEAN_SECONDS = 15.0

TASK = """\
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        self.net = nn.Sequential(*layers)

    def forward(self, inputs):
        time.sleep(0.02 if self.training else 0.5)
        return self.net(inputs)


class Line:
    distribution = "gaussian"

    def model(self):
        return Slow()

    def train_data(self, data_dir):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(64, 6, generator=generator)
        return TensorDataset(inputs, inputs @ torch.randn(6, 3, generator=generator))

    test_data = train_data
"""
SPEC = {
    "name": "faults",
    "task": "line.py:Line",
    "data": {"name": None},
    "steps": STEPS,
    "batch_size": 20,
    "dtype": "float64",
    "optimizer": {
        "damping": {"initial": 1.0},
        "inverse_update_period": 4,
        "statistics_fraction": 1.0,
        "fisher_fraction": 1.0,
    },
    "workers": {"gradient": 2, "inverse": 1},
    "staleness": {"max_steps": 0, "max_degraded_steps": 0},
    "checkpoint": {"every_steps": CHECKPOINT},
    "faults": {"stall_seconds": STALL_SECONDS},
}


@dataclass(frozen=True)
class Case:
    """One fault: which process gets which signal at which moment."""

    role: str
    signal: str
    moment: str


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `difference` is relative, of the parameters at the end."""

    state: str
    resumes: int
    step_seconds: float | None
    difference: float | None
    left_behind: list[str]
    said: str


class Trial:
    """One job in a folder of its own, whose processes all have a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.mark = uuid.uuid4().hex
        self.ray_folders: set[str] = set()
        self.shared_memory: set[str] = set()
        (folder / "line.py").write_text(TASK)
        (folder / "job.json").write_text(json.dumps(SPEC))

    def start(self, *, resume: bool) -> subprocess.Popen[str]:
        """Start an attempt."""
        command = [sys.executable, "-m", "kfac_dist.cli", "train", str(self.folder / "job.json")]
        command += ["--run-dir", str(self.run), *(["--resume"] if resume else [])]
        environment = os.environ | {_MARK: self.mark, "HOME": str(self.folder)}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield the processes of the job that live, with their command lines."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"{_MARK}={self.mark}".encode() not in (entry / "environ").read_bytes():
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                maps = (entry / "maps").read_text()
            except OSError:
                continue
            mapped = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
            self.shared_memory |= {path for path in mapped if path.startswith("/dev/shm/")}
            for word in command.split():
                if "/tmp/kfac-" in word:
                    self.ray_folders.add("/tmp/" + word.split("/tmp/")[1].split("/")[0])
            yield int(entry.name), command

    def pid_of(self, role: str, driver: int) -> int | None:
        """Return a process of this role, None if it has not started yet."""
        if role == "driver":
            return driver
        # Set at the first call; before that the process has no role.
        found = [pid for pid, name in self.processes() if name.startswith(_TITLES[role])]
        return min(found, default=None)

    def records(self) -> list[dict[str, Any]]:
        """Return the whole records so far."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def has_come_to(self, moment: str, step: int) -> bool:
        """Return whether the moment has come, if `step` is the last step that has a record."""
        if moment == "first step":
            events = self.run / "events.jsonl"
            return events.exists() and '"kind":"started"' in events.read_text()
        return moment == "start" or step >= _AFTER_RECORD[moment]

    def left_behind(self) -> list[str]:
        """Return what is left of the job after some time."""
        deadline = time.monotonic() + _CLEAN_SECONDS
        while True:
            left = [f"process {name[:60]}" for _, name in self.processes()]
            places = self.ray_folders | self.shared_memory
            left += [place for place in sorted(places) if Path(place).exists()]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def parameters(self) -> Any:
        """Return the parameters at the end, None if the job did not come to it."""
        path = self.run / "checkpoints" / f"step-{STEPS:08d}" / "parameter_server.safetensors"
        return load_file(path)["parameters"] if path.exists() else None


def disturbed(trial: Trial, case: Case | None, expected: Any) -> Outcome:
    """Run a job with a fault, and resume it until it has ended."""
    driver, said, resumes = trial.start(resume=False), [], 0
    try:
        struck = None if case is None else strike(trial, case, driver)
        if case is not None and (case.role, case.signal) == ("driver", "stop"):
            time.sleep(2 * STALL_SECONDS)  # it must blame nobody for its own absence
            driver.send_signal(signal.SIGCONT)
        while True:
            _, errors = driver.communicate(timeout=_CASE_SECONDS)
            if errors.strip():
                said.append(errors.strip().splitlines()[-1])
            if driver.returncode == 0 or resumes == _MOST_RESUMES:
                break
            resumes += 1
            driver = trial.start(resume=(trial.run / "job.json").exists())
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.communicate()
    state = json.loads((trial.run / "job.json").read_text())["state"]
    return Outcome(
        state=state,
        resumes=resumes,
        step_seconds=None if struck is None else seconds_to_new_step(trial, *struck),
        difference=None if expected is None else distance(trial.parameters(), expected),
        left_behind=trial.left_behind(),
        said=" / ".join(said),
    )


def strike(trial: Trial, case: Case, driver: subprocess.Popen[str]) -> tuple[float, int]:
    """Send the signal at its moment; return the time, and the last step recorded by then."""
    deadline = time.monotonic() + _CASE_SECONDS
    while time.monotonic() < deadline and driver.poll() is None:
        step = max((record["step"] for record in trial.records()), default=0)
        if trial.has_come_to(case.moment, step):
            pid = trial.pid_of(case.role, driver.pid)
            if pid is not None and (case.role != "driver" or (trial.run / "job.json").exists()):
                os.kill(pid, SIGNALS[case.signal])
                return time.time(), step
        time.sleep(0.005)
    raise RuntimeError(f"{case}: the moment did not come")


def seconds_to_new_step(trial: Trial, struck: float, last_step: int) -> float | None:
    """Return the time from the signal to the first step applied after it that had no record."""
    later = [
        record["time"]
        for record in trial.records()
        if record["step"] > last_step and record["time"] > struck
    ]
    return min(later) - struck if later else None


def distance(parameters: Any, expected: Any) -> float | None:
    """Return the largest difference, relative to the largest parameter."""
    if parameters is None:
        return None
    return float(abs(parameters - expected).max() / abs(expected).max())


def faults_of(case: Case, outcome: Outcome) -> list[str]:
    """Return what is wrong with an outcome."""
    wrong = [f"left behind: {left}" for left in outcome.left_behind]
    if outcome.state != "SUCCEEDED":
        wrong.append(f"ended {outcome.state}: {outcome.said}")
    if outcome.resumes and case.role != "driver":
        wrong.append(f"resumed {outcome.resumes} times: {outcome.said}")
    exact = case.role != "inverse_worker"
    if exact and (outcome.difference is None or outcome.difference > LIMIT):
        wrong.append(f"parameters differ by {outcome.difference}")
    return wrong


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_options(parser)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    return parser.parse_args()


def main() -> int:
    """Run all cases and tell what became of them."""
    options = parse()
    moments = ["middle"] if options.short else options.moments
    cases = [Case(r, s, m) for r in options.roles for s in options.signals for m in moments]
    results, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        still = Trial(_made(Path(folder) / "still"))
        disturbed(still, None, None)
        expected = still.parameters()
        for number, case in enumerate(cases):
            trial = Trial(_made(Path(folder) / str(number)))
            outcome = disturbed(trial, case, expected)
            found = faults_of(case, outcome)
            wrong += [f"{case.role} {case.signal} {case.moment}: {fault}" for fault in found]
            results.append(asdict(case) | asdict(outcome) | {"wrong": found})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    result = {"cases": results, "wrong": wrong, "stall_seconds": STALL_SECONDS, **surroundings()}
    deliver("faults", result, page(results, wrong), options.out)
    return 1 if wrong else 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def page(results: list[dict[str, Any]], wrong: list[str]) -> str:
    """Return the results as a Markdown page."""
    rows = [
        [
            result["role"].replace("_", " "),
            result["signal"],
            result["moment"],
            result["state"],
            result["resumes"],
            "" if result["step_seconds"] is None else f"{result['step_seconds']:.1f}",
            "" if result["difference"] is None else f"{result['difference']:.1e}",
            "; ".join(result["wrong"]),
        ]
        for result in results
    ]
    header = [
        "role",
        "signal",
        "moment",
        "end",
        "resumes",
        "s to a new step",
        "difference",
        "wrong",
    ]
    return document(
        "Faults: what becomes of a job whose processes are killed or stopped",
        f"A synchronous job of {STEPS} steps on 2 gradient workers, 1 inverse worker and 1 "
        f"parameter server, `faults.stall_seconds` {STALL_SECONDS:g}. A killed driver is "
        "followed by a resume from the newest checkpoint, and the time to a new step contains "
        "the start of that attempt. The difference is of the final parameters from those of the "
        "undisturbed run, relative to the largest. A killed inverse worker loses the statistics "
        "since the last checkpoint, so there the parameters may differ.",
        table(header, rows),
        f"Wrong: {len(wrong)} of {len(results)} cases." if results else "",
    )


if __name__ == "__main__":
    sys.exit(main())
