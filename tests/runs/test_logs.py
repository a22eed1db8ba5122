from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
