"""The versions in pyproject.toml, constraints.txt and the code agree, and `make` finds a Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kfac_dist.supported import OLDEST_PYTHON, RAY
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ("bash", "sort", "awk", "head")


def ranges() -> dict[str, str]:
    """The version range of each dependency."""
    parts = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", text) for text in PROJECT["dependencies"])
    return {part[1]: part[2] for part in parts if part is not None}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def minor(version: str) -> tuple[int, int]:
    major, minor_version = version.split(".")[:2]
    return int(major), int(minor_version)


def test_python_has_no_upper_bound() -> None:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]


def test_ray_is_the_range_whose_internals_are_known() -> None:
    (low, high) = ranges()["ray"].split(",")
    newest_major, newest_minor = RAY.newest
    assert low == ">=" + ".".join(map(str, RAY.oldest))
    assert high == f"<{newest_major}.{newest_minor + 1}"


def test_ci_runs_the_newest_ray_and_a_torch_of_the_range() -> None:
    assert minor(pins()["ray"]) == RAY.newest
    lowest = re.match(r">=([\d.]+)", ranges()["torch"])
    assert lowest is not None
    assert minor(pins()["torch"]) >= minor(lowest[1])


@pytest.fixture
def path_folder(tmp_path: Path) -> Path:
    """A folder for a PATH of its own, with the tools of the script and without a Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return folder


def pythons(path_folder: Path, which: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / ".ci/pythons", which],
        env={**os.environ, "PATH": str(path_folder), "PYENV_ROOT": str(path_folder / "pyenv")},
        capture_output=True,
        text=True,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def pretend(path: Path, minor_version: int) -> Path:
    """A Python that says it is of another minor version."""
    pretence = f'sys.version_info = type("", (tuple,), dict(minor={minor_version}, '
    pretence += 'releaselevel="final"))((3, sys.version_info.minor))'
    line = f"""exec {sys.executable} -c "import sys; {pretence.replace('"', "'")}; $2" "$3" """
    return program(path, line)


def test_the_newest_python_that_works_is_taken(path_folder: Path) -> None:
    pretend(path_folder / "python3.11", 11)
    newest = pretend(path_folder / "python3.12", 12)
    # What pyenv leaves on the PATH for a version that is not active.
    program(path_folder / "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    program(path_folder / "python3.14", "echo 'No module named ensurepip' >&2; exit 1")
    done = pythons(path_folder, "newest")
    assert (done.returncode, done.stdout) == (0, f"{newest}\n")


def test_all_are_found_once_a_version_and_those_of_pyenv_too(path_folder: Path) -> None:
    on_path = pretend(path_folder / "python3.11", 11)
    hidden = pretend(path_folder / "pyenv/versions/3.12.1/bin/python3.12", 12)
    pretend(path_folder / "pyenv/versions/3.11.7/bin/python3.11", 11)
    assert pythons(path_folder, "all").stdout.split() == [str(hidden), str(on_path)]
    assert pythons(path_folder, "newest").stdout.split() == [str(on_path)]


def test_without_a_python_it_is_said_what_to_do(path_folder: Path) -> None:
    done = pythons(path_folder, "newest")
    assert (done.returncode, done.stdout) == (1, "")
    assert "make PYTHON=" in done.stderr
