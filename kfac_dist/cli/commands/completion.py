"""`kfac-dist completion`: the script that teaches a shell the commands and options."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer


class Shell(StrEnum):
    """Shells that can be taught."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="The shell.")] = Shell.bash,
) -> None:
    """Print a completion script: eval "$(kfac-dist completion bash)"."""
    # The protocol between such a script and the program; the program can print the script, too.
    os.environ["_KFAC_DIST_COMPLETE"] = f"source_{shell}"
    context.find_root().command(args=[], prog_name="kfac-dist")
