"""Progress of a job on stderr: a live line on a terminal, now and then a plain one elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import AbstractContextManager
from typing import IO, Protocol, Self

_PLAIN_INTERVAL_SECONDS = 10.0
_WINDOW = 20  # steps over which the rate is taken


class Staleness(Protocol):
    """Of the inverses, over the layers, in steps."""

    @property
    def mean(self) -> float:
        """The mean."""

    @property
    def max(self) -> float:
        """The maximum."""


class Step(Protocol):
    """What is shown of a step: of a record of the run's, or of what a server tells."""

    @property
    def step(self) -> int:
        """Its number, from 1."""

    @property
    def time(self) -> float:
        """When it ended, in Unix seconds."""

    @property
    def objective(self) -> float:
        """Of its batch, in nats a case."""

    @property
    def damping(self) -> float | None:
        """The damping lambda, None where there is none."""

    @property
    def inverse_staleness_steps(self) -> Staleness | None:
        """None where there are no inverses."""


class Happening(Protocol):
    """What is shown of an event."""

    @property
    def severity(self) -> str:
        """The severity info is not shown."""

    @property
    def step(self) -> int:
        """The last step that was begun."""

    @property
    def message(self) -> str:
        """A whole sentence."""


class Progress(AbstractContextManager["Progress"], Protocol):
    """Something that shows how a job goes."""

    def on_record(self, record: Step) -> None:
        """Show a step."""

    def on_event(self, event: Happening) -> None:
        """Show an event."""

    def on_state(self, state: str, message: str | None) -> None:
        """Show where the job stands, when that changes."""


def make_progress(num_steps: int, *, plain: bool) -> Progress:
    """The progress for this stderr; `plain` allows lines where it is no terminal."""
    if sys.stderr.isatty():
        return LiveProgress(num_steps)
    return PlainProgress(num_steps, sys.stderr if plain else None)


class _Rate:
    """Steps a second over the last steps, by their times of arrival."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def add(self, record: Step) -> float | None:
        self._arrivals.append((record.step, record.time))
        (first, begun), (last, ended) = self._arrivals[0], self._arrivals[-1]
        return (last - first) / (ended - begun) if ended > begun else None


class PlainProgress:
    """Lines to `stream`: a step every ten seconds, and what went wrong; None is silence."""

    def __init__(self, num_steps: int, stream: IO[str] | None) -> None:
        self._num_steps = num_steps
        self._stream = stream
        self._rate = _Rate()
        self._shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def on_record(self, record: Step) -> None:
        """Write a line if ten seconds have passed since the last, or the job is at its end."""
        facts = describe(record, self._rate.add(record))
        now = time.monotonic()
        if now - self._shown < _PLAIN_INTERVAL_SECONDS and record.step < self._num_steps:
            return
        self._shown = now
        self._write(f"step {record.step}/{self._num_steps}  {facts}")

    def on_event(self, event: Happening) -> None:
        """Write a warning or an error."""
        if event.severity != "info":
            self._write(f"{event.severity}: step {event.step}: {event.message}")

    def on_state(self, state: str, message: str | None) -> None:
        """Write a line."""
        self._write(f"{state}: {message}" if message else state)

    def _write(self, line: str) -> None:
        if self._stream is not None:
            self._stream.write(line + "\n")
            self._stream.flush()


class LiveProgress:
    """One line that follows the job, warnings and errors above it."""

    def __init__(self, num_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        self._rate = _Rate()
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            console=Console(stderr=True, highlight=False),
            refresh_per_second=8,
        )
        self._num_steps = num_steps
        self._task = self._bar.add_task("starting workers", total=num_steps, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_record(self, record: Step) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            completed=record.step,
            description=f"step {record.step}/{self._num_steps}",
            facts=describe(record, self._rate.add(record)),
        )

    def on_event(self, event: Happening) -> None:
        """Print a warning or an error above the bar."""
        if event.severity != "info":
            style = "red" if event.severity == "error" else "yellow"
            text = f"step {event.step}: {event.message}"
            self._bar.console.print(text, style=style, markup=False)

    def on_state(self, state: str, message: str | None) -> None:
        """Say it where the step will be."""
        self._bar.update(self._task, description=state.lower(), facts=message or "")


def describe(record: Step, rate: float | None) -> str:
    """Objective, rate, staleness and damping of a step, what there is of them."""
    facts = [f"objective {record.objective:.4g}"]
    if rate is not None:
        facts.append(f"{rate:.3g} steps/s")
    staleness = record.inverse_staleness_steps
    if staleness is not None:
        facts.append(f"staleness {staleness.mean:.1f} (max {staleness.max:.0f})")
    if record.damping is not None:
        facts.append(f"damping {record.damping:.3g}")
    return " · ".join(facts)
