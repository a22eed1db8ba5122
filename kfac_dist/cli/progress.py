"""Progress of a job on stderr: a live line on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import IO, Protocol, Self

from kfac_dist.cli.terminal import indented, one_line

_PLAIN_INTERVAL_SECONDS = 10.0
_WINDOW = 20  # steps over which the rate is taken

STALENESS = ("inverse_staleness_steps.mean", "inverse_staleness_steps.max")
"""Names in the history of the staleness of the inverses, over the layers."""


class Step(Protocol):
    """A step to show: a record of the run, or what a server reports of it."""

    @property
    def step(self) -> int:
        """The number of the step, from 1."""

    @property
    def time(self) -> float:
        """Unix time in seconds at which it ended."""

    @property
    def values(self) -> Mapping[str, float]:
        """Its numbers by their names in the history; `objective` is always there."""


class Happening(Protocol):
    """An event to show."""

    @property
    def severity(self) -> str:
        """`info` is not shown."""

    @property
    def step(self) -> int:
        """The last step that was begun."""

    @property
    def message(self) -> str:
        """What happened, for people."""


class Progress(AbstractContextManager["Progress"], Protocol):
    """Shows the progress of a job."""

    def on_record(self, record: Step) -> None:
        """Show a step."""

    def on_event(self, event: Happening) -> None:
        """Show an event."""

    def on_state(self, state: str, message: str | None) -> None:
        """Show the state of the job, each time it changes."""


def make_progress(num_steps: int, *, plain: bool) -> Progress:
    """Return the progress for this stderr; without a terminal it is silent unless `plain`."""
    if sys.stderr.isatty():
        return LiveProgress(num_steps)
    return PlainProgress(num_steps, sys.stderr if plain else None)


class _Rate:
    """Steps a second over the last steps, by the times of their records."""

    def __init__(self) -> None:
        self._times: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def add(self, record: Step) -> float | None:
        self._times.append((record.step, record.time))
        (first, begun), (last, ended) = self._times[0], self._times[-1]
        return (last - first) / (ended - begun) if ended > begun else None


class PlainProgress:
    """Lines to `stream`: a step every ten seconds, and warnings; None writes nothing."""

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
        """Write a line if ten seconds have passed since the last, or this step is the last."""
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
        if self._stream is None:
            return
        try:
            self._stream.write(indented(line) + "\n")
            self._stream.flush()
        except OSError:  # nobody reads it any more, as after `2>&1 | head`; the job continues
            self._stream = None


class LiveProgress:
    """One line that follows the job, with warnings and errors above it."""

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
            text = indented(f"step {event.step}: {event.message}")
            self._bar.console.print(text, style=style, markup=False, emoji=False)

    def on_state(self, state: str, message: str | None) -> None:
        """Show the state in the place of the step."""
        self._bar.update(self._task, description=state.lower(), facts=one_line(message or ""))


def describe(step: Step, rate: float | None) -> str:
    """Return the numbers of a step for the progress line, with `rate` in steps a second."""
    facts = number_facts(step.values, progress_numbers())
    if rate is not None:
        facts.insert(1, f"{rate:.3g} steps/s")
    return " · ".join(facts)


def progress_numbers() -> list[str]:
    """Return the names of the numbers in a progress line; the first is `objective`."""
    from kfac_dist.runs.step_record import STEP_NUMBERS  # pydantic takes a while to load

    return [name for name, number in STEP_NUMBERS.items() if number.in_progress]


def number_facts(values: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Return a phrase for each of `names` that was measured, and one for the staleness."""
    facts = [f"{name} {values[name]:.4g}" for name in names if name in values]
    mean, most = (values.get(name) for name in STALENESS)
    if mean is not None and most is not None:
        facts.append(f"staleness {mean:.1f} (max {most:.0f})")
    return facts
