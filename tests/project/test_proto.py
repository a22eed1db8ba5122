"""The committed stubs are those of the proto files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

STUBS = ROOT / "kfac_dist/v1"


def test_the_stubs_are_generated_from_the_proto_files(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "proto/generate", tmp_path], check=True, env=os.environ | {"PYTHON": sys.executable}
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / "kfac_dist/v1").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert fresh == committed, "run `make proto`"
