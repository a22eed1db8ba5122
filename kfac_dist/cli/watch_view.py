"""What `watch` draws: state, progress, numbers, a staleness bar for each layer, last events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kfac_dist.cli.job_view import GROUP_NUMBERS, age
from kfac_dist.cli.output import local_time
from kfac_dist.cli.progress import STALENESS, number_facts
from kfac_dist.cli.terminal import indented, plain
from kfac_dist.coordination.jobs.lifecycle import ENDED
from kfac_dist.runs.step_record import STEP_NUMBERS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kfac_dist.service.client import Update
    from kfac_dist.service.job_records import Job, JobEvent, MetricSeries

_VERSIONS = "inverse_version_step."
_NUMBERS = tuple(name for name, number in STEP_NUMBERS.items() if number.in_watch)
METRICS = (*_NUMBERS, *GROUP_NUMBERS, *STALENESS, f"{_VERSIONS}*")
_NUM_EVENTS, _NUM_LAYERS, _BAR_WIDTH = 6, 16, 30
_STYLES = {"warning": "yellow", "error": "red"}


class WatchView:
    """A job as far as updates have described it; rich draws it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._values: dict[str, float] = {}
        self._versions: dict[str, int] = {}
        self._step = job.step
        self._events: deque[JobEvent] = deque(maxlen=_NUM_EVENTS)

    def add(self, update: Update) -> None:
        """Add an update."""
        if update.job is not None:
            self._job = update.job
            self._step = max(self._step, update.job.step)
        self._events.extend(update.events)
        for series in update.metrics:
            self._add_series(series)

    def _add_series(self, series: MetricSeries) -> None:
        last = series.points[-1]
        self._step = max(self._step, last.step)
        if series.name.startswith(_VERSIONS):
            self._versions[series.name.removeprefix(_VERSIONS)] = int(last.value)
        else:
            self._values[series.name] = last.value

    def __rich__(self) -> RenderableType:
        return Group(
            self._head(),
            *self._progress(),
            *self._numbers(),
            *self._group(),
            *self._layers(),
            *self._log(),
        )

    def _head(self) -> Text:
        job = self._job
        until = job.ended_at or time.time()
        text = Text.assemble(
            (plain(job.id), "bold"),
            f"  {job.state}",
            f"  attempt {job.attempt}",
            f"  {age(until - (job.started_at or job.created_at))}",
        )
        if job.message:
            text.append(
                f"\n{indented(job.message)}", style="red" if job.state == "FAILED" else "dim"
            )
        return text

    def _progress(self) -> Iterable[RenderableType]:
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._job.num_steps, completed=self._step, width=40)
        grid.add_row(f"step {self._step}/{self._job.num_steps}", bar)
        yield grid

    def _numbers(self) -> Iterable[RenderableType]:
        if facts := number_facts(self._values, _NUMBERS):
            yield Text("  ".join(facts))

    def _group(self) -> Iterable[RenderableType]:
        """Say how many there are now; each change of the members makes a new group."""
        if any(name not in self._values for name in GROUP_NUMBERS):
            return
        epoch, workers, shards = (int(self._values[name]) for name in GROUP_NUMBERS)
        wished = (self._job.spec.get("workers") or {}).get("gradient")
        of = f" of {wished}" if wished and workers < wished else ""
        yield Text(f"group {epoch}: gradient workers {workers}{of}, shards {shards}")

    def _layers(self) -> Iterable[RenderableType]:
        """Draw the stalest layers; a full bar is the bound, or the stalest layer if beyond it."""
        if not self._versions or self._job.state in ENDED:
            return
        ages = {layer: self._step - version for layer, version in self._versions.items()}
        bound = int((self._job.spec.get("staleness") or {}).get("max_steps") or 0)
        full = max(bound, *ages.values(), 1)
        table = Table.grid(padding=(0, 1))
        for layer in sorted(ages, key=lambda layer: -ages[layer])[:_NUM_LAYERS]:
            length = round(_BAR_WIDTH * ages[layer] / full)
            style = "red" if bound and ages[layer] > bound else "cyan"
            table.add_row(
                Text(plain(layer)), Text("█" * length or "·", style=style), str(ages[layer])
            )
        limit = f", at most {bound}" if bound else ""
        yield Text(f"age of each layer's inverse in steps{limit}", style="dim")
        yield table

    def _log(self) -> Iterable[RenderableType]:
        for event in self._events:
            line = indented(f"{local_time(event.time)} step {event.step} {event.message}")
            yield Text(line, style=_STYLES.get(event.severity, "dim"))
