"""Runs `kfac-dist serve` as a user does, and sends it requests."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.command import CommandLine

PATIENCE = 400.0  # seconds, for what takes tens of seconds on an idle machine


class Server:
    """`kfac-dist serve` in the background, always at the same port."""

    def __init__(self, command: CommandLine) -> None:
        self.command = command
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.process = self.command.start(
            "serve", "--listen", f"127.0.0.1:{self.port}", "-o", "json"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        assert json.loads(line)["address"] == f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """End the server, its cluster and every process it has started."""
        self.command.run("cluster", "down", "--force", seconds=PATIENCE)
        for process in self.command.started:
            if process.poll() is None:
                process.kill()
                process.communicate()


def answer(command: CommandLine, *arguments: str | Path) -> dict[str, Any]:
    done = command.run(*arguments, "-o", "json", seconds=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processes_with(text: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if text in line:
            found.append(line)
    return found
