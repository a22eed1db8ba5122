"""The program as a process: what it imports, how fast it answers, how it ends."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; from kfac_dist.cli import main; sys.argv[0] = 'kfac-dist'; main()"
HEAVY = ("torch", "ray", "numpy", "grpc", "sqlalchemy")


def _start(*arguments: str, code: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["replay", "--help"],
        ["serve", "--help"],
        ["submit", "--help"],
        ["--version"],
        ["doctor"],
    ],
)
def test_commands_that_do_not_train_import_nothing_heavy(arguments: list[str]) -> None:
    watched = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', [m for m in {HEAVY} if m in sys.modules]))\n"
    )
    done = _start(*arguments, code=watched + PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_help_takes_under_half_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _start("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # CPU time instead of wall-clock time, since other tests may run beside this one.
    assert min(seconds() for _ in range(3)) < 0.5


def test_the_version_is_that_of_the_package() -> None:
    from kfac_dist import __version__

    assert _start("--version").stdout == f"kfac-dist {__version__}\n"


def test_a_closed_pipe_prints_no_traceback() -> None:
    command = f'"{sys.executable}" -c "{PROGRAM}" spec schema | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(shell: str) -> None:
    done = _start("completion", shell)
    assert done.returncode == 0
    assert "kfac-dist" in done.stdout


def test_the_completion_protocol_answers_with_commands() -> None:
    environment = os.environ | {
        "_KFAC_DIST_COMPLETE": "complete_bash",
        "COMP_WORDS": "kfac-dist tr",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["train"]


def test_the_installed_command_is_this_program() -> None:
    command = Path(sys.executable).with_name("kfac-dist")
    if not command.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "train" in done.stdout
