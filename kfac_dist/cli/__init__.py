"""The command line `kfac-dist`.

One command a file. `--help` answers without torch and Ray: a command imports what it
needs when it runs. The environment is read here and nowhere else.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from kfac_dist.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while the commands were still being loaded
        code = 130
    sys.exit(code)
