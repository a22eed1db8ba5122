"""`kfac-dist completion`: the script with which a shell completes commands and options."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer


class Shell(StrEnum):
    """The supported shells."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")] = (
        Shell.bash
    ),
) -> None:
    """Print a completion script for a shell.

    To use it, run: eval "$(kfac-dist completion bash)"
    """
    # typer prints the script when it finds this variable.
    os.environ["_KFAC_DIST_COMPLETE"] = f"source_{shell}"
    context.find_root().command(args=[], prog_name="kfac-dist")
