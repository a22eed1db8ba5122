"""The blocks of the README, and the code of the docs, are what they say they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_dist.config import load_spec
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
OWN_LOOP = (ROOT / "docs/own_loop.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python") + blocks("python", OWN_LOOP))
def test_python_blocks_run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "after 20 steps" in done.stdout


@pytest.mark.parametrize("text", blocks("yaml"))
def test_specifications_are_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert load_spec(path).name == "first-job"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_folders_of_the_map_exist() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(rows)):
        assert (ROOT / name).exists(), name
