"""Runs the installed command `kfac-dist` as a user does: as a process, with a home for the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import wait_until

COMMAND = [str(Path(sys.executable).parent / "kfac-dist")]
SPEC = """\
name: small
task: autoencoder
task_args: {hidden: [24, 8]}
data: {name: mnist-5k, limit: 300}
steps: 12
batch_size: 100
optimizer: {name: kfac, damping: {initial: 30}, inverse_update_period: 4, fisher_fraction: 1.0}
workers: {gradient: 1, inverse: 1}
staleness: {max_steps: 8}
checkpoint: {every_steps: 4}
"""


@dataclass
class Running:
    """A `kfac-dist train` in the background, and its run folder."""

    process: subprocess.Popen[str]
    run_dir: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        if not path.is_file():
            return []
        whole = path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def events(self) -> list[str]:
        return [event["kind"] for event in self.lines("events.jsonl")]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return len(self.lines("metrics.jsonl")) >= step

        wait_until(reached, f"step {step}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def actor(self, title: str) -> psutil.Process:
        def find() -> psutil.Process | None:
            for process in self.family():
                try:
                    if "".join(process.cmdline()).startswith(f"ray::{title}"):
                        return process
                except psutil.NoSuchProcess:
                    continue
            return None

        return wait_until(find, f"a process titled ray::{title}")

    def finish(self, seconds: float = 90.0) -> tuple[int, dict[str, Any], str]:
        """Return the exit code, the last line of stdout as JSON, and stderr."""
        stdout, stderr = self.process.communicate(timeout=seconds)
        last = stdout.strip().splitlines()[-1] if stdout.strip() else "{}"
        return self.process.returncode, json.loads(last), stderr


class CommandLine:
    """Runs the command with a private home; `spec` writes a job specification."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "KFAC_"))},
            "HOME": str(folder),
            "KFAC_DIST_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        }
        self.started: list[subprocess.Popen[str]] = []

    def spec(self, text: str = SPEC, name: str = "job.yaml") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def run(self, *arguments: str | Path, seconds: float = 120.0) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=self.environment,
            cwd=self.folder,
        )

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command in the background."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.folder,
        )
        self.started.append(process)
        return process

    def train(self, spec: Path, *arguments: str, run_dir: str = "run") -> Running:
        folder = self.folder / run_dir
        process = self.start("train", spec, "--run-dir", folder, "-o", "json", *arguments)
        return Running(process=process, run_dir=folder)
