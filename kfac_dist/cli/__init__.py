"""The command line `kfac-dist`.

Each command has its own file in `commands/`. A command imports torch, Ray and gRPC only when it
runs, so that `--help` answers at once. Only this package reads the environment.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from kfac_dist.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C while the commands were still being imported
        code = 130
    sys.exit(code)
