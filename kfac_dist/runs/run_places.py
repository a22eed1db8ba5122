"""The names in a run folder; nothing else in the project spells them out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LOG_NAME = re.compile(
    r"(?P<role>[a-z][a-z_]{0,40})-(?P<rank>\d{1,6})(?:\.a(?P<attempt>\d{1,6}))?\.(?:log|out)"
)


class LogName(NamedTuple):
    """Which worker's log a file is, and of which attempt; attempts count from 1."""

    role: str
    rank: int
    attempt: int

    @property
    def stem(self) -> str:
        """The file name without its ending, such as `inverse_worker-0.a2`."""
        attempt = "" if self.attempt == 1 else f".a{self.attempt}"
        return f"{self.role}-{self.rank}{attempt}"


@dataclass(frozen=True)
class RunPlaces:
    """Where everything lies in a run folder; nothing is created or checked.

        spec.yaml       the resolved specification
        job.json        state of the job                        JobRecord
        metrics.jsonl   one step a line                         StepRecord
        events.jsonl    one event a line                        Event
        summary.json    the result, once the job has ended      JobSummary
        report.html     curves and staleness, readable offline
        logs/ROLE-RANK.log, from the second attempt on logs/ROLE-RANK.a2.log
        logs/ROLE-RANK.out                                      what that process printed
        checkpoints/                                            runs/checkpoint_folder.py

    Only for a job of the control plane:

        launch.json     what the driver of the newest attempt is to run
        report.token    the secret with which it reports
        code/           the user's own code
        driver.json     how the driver ended, also before there was a run
    """

    folder: Path

    @property
    def spec(self) -> Path:
        """The resolved specification."""
        return self.folder / "spec.yaml"

    @property
    def job(self) -> Path:
        """The state of the job. A folder with this file holds a run."""
        return self.folder / "job.json"

    @property
    def has_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.job.exists()

    @property
    def metrics(self) -> Path:
        """The journal of steps."""
        return self.folder / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The journal of events."""
        return self.folder / "events.jsonl"

    @property
    def summary(self) -> Path:
        """The result of a job that has ended."""
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        """The page with curves and staleness."""
        return self.folder / "report.html"

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.folder / "logs"

    def log(self, role: str, rank: int, attempt: int = 1) -> Path:
        """Return the log of one worker; each attempt has files of its own."""
        return self.logs / f"{LogName(role, rank, attempt).stem}.log"

    def printed(self, role: str, rank: int, attempt: int = 1) -> Path:
        """Return the file for what the process of one worker prints."""
        return self.logs / f"{LogName(role, rank, attempt).stem}.out"

    @staticmethod
    def parse_log_name(name: str) -> LogName | None:
        """Parse the name of a file that `log` or `printed` returned; None for any other name."""
        match = _LOG_NAME.fullmatch(name)
        if match is None:
            return None
        return LogName(match["role"], int(match["rank"]), int(match["attempt"] or 1))

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.folder / "checkpoints"

    @property
    def launch(self) -> Path:
        """What the driver of the newest attempt is to run."""
        return self.folder / "launch.json"

    @property
    def report_token(self) -> Path:
        """The secret with which that driver reports."""
        return self.folder / "report.token"

    @property
    def code(self) -> Path:
        """The folder of the user's own code."""
        return self.folder / "code"

    @property
    def driver_end(self) -> Path:
        """How the driver of the newest attempt ended."""
        return self.folder / "driver.json"
