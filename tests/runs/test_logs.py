from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kfac_dist.runs.logs import log_tail

_PRINTS = """
import os, sys
from pathlib import Path
from kfac_dist.runs.logs import redirect_output

redirect_output(Path(sys.argv[1]))
print("from Python", flush=True)
os.system("echo from a child")
os.write(2, b"from C\\n")
"""


def test_all_that_a_process_prints_is_appended_beside_its_log(tmp_path: Path) -> None:
    log_path = tmp_path / "logs" / "driver-0.log"
    for _ in range(2):
        command = [sys.executable, "-c", _PRINTS, str(log_path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (shown.stdout, shown.stderr) == ("", "")
    lines = log_path.with_suffix(".out").read_text().splitlines()
    assert lines == ["from Python", "from a child", "from C"] * 2


def test_the_tail_of_a_log_has_whole_lines(tmp_path: Path) -> None:
    log_path = tmp_path / "driver-0.log"
    assert log_tail(log_path) == ""
    log_path.write_text("first\nlast\n")
    assert log_tail(log_path) == "first\nlast"
    log_path.write_text(f"{'x' * 5000}\nlast but one\nlast\n")
    assert log_tail(log_path) == "last but one\nlast"


def test_of_a_last_line_that_is_very_long_the_end_is_shown(tmp_path: Path) -> None:
    log_path = tmp_path / "driver-0.log"
    log_path.write_text(f"first\n{'ä' * 5000} the end\n")
    assert log_tail(log_path).endswith("ä the end")
    assert len(log_tail(log_path).encode()) <= 4003  # the cut may be within a letter
