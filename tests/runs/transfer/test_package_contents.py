"""What goes into a package and what does not: each file left out has its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kfac_dist.errors import InvalidSpecError
from kfac_dist.runs.transfer.package_contents import IGNORE_FILE, Contents, contents_of


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12345")


def packed(contents: Contents) -> list[str]:
    return [file.name for file in contents.packed]


def reasons(contents: Contents) -> dict[str, str]:
    return {entry.name: entry.why for entry in contents.left_out}


def test_what_is_left_out_has_a_reason_and_a_size(tmp_path: Path) -> None:
    write(tmp_path, "task.py", ".env", ".git/HEAD", "runs/a/b", "runs/c", "sub/__pycache__/x.pyc")
    (tmp_path / "data").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, "a\\b.py", "a\x1b[31m.py")
    contents = contents_of(tmp_path)
    assert packed(contents) == ["task.py"]
    why = reasons(contents)
    assert why["data"] == "a link to /nowhere"
    assert why[".env"] == "hidden"
    assert why["runs/"] == "runs/ is left out by default"
    assert why["sub/__pycache__/"] == "a folder that no job needs"
    assert why["pipe"] == "not a plain file"
    assert "backslash" in why["a\\b.py"]
    assert "cannot be printed" in why["a\\x1b[31m.py"]
    runs = next(entry for entry in contents.left_out if entry.name == "runs/")
    assert (runs.num_files, runs.num_bytes) == (2, 10)


def test_the_ignore_file_has_the_syntax_of_gitignore(tmp_path: Path) -> None:
    write(tmp_path, "task.py", "a.csv", "keep.csv", "deep/raw/x", "raw/y", ".cfg/z", "runs/r.py")
    lines = ["# big files", "*.csv", "!keep.csv", "/raw/", "!.cfg/", "!runs/"]
    (tmp_path / IGNORE_FILE).write_text("\n".join(lines))
    contents = contents_of(tmp_path)
    assert packed(contents) == ["keep.csv", "task.py", ".cfg/z", "deep/raw/x", "runs/r.py"]
    assert reasons(contents) == {
        "a.csv": f"line 2 of {IGNORE_FILE}: *.csv",
        "raw/": f"line 4 of {IGNORE_FILE}: /raw/",
        IGNORE_FILE: "the ignore file itself",
    }


def test_a_wrong_pattern_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / IGNORE_FILE).write_text("*.csv\n!\n")
    with pytest.raises(InvalidSpecError, match=r"line 2: '!' is not a pattern"):
        contents_of(tmp_path)


def test_only_what_nobody_asked_for_is_a_surprise(tmp_path: Path) -> None:
    write(tmp_path, "task.py", "a.csv", "__pycache__/task.pyc", ".git/HEAD")
    (tmp_path / IGNORE_FILE).write_text("*.csv")
    assert contents_of(tmp_path).surprises() is None
    write(tmp_path, ".env")
    (tmp_path / "link").symlink_to("task.py")
    said = contents_of(tmp_path).surprises() or ""
    assert "1 hidden" in said
    assert "1 links, such as '.env'" in said
