from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.command import CommandLine


@pytest.fixture
def command(tmp_path: Path) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path)
    yield line
    for process in line.started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
