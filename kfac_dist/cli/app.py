"""All commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from kfac_dist._version import __version__
from kfac_dist.cli.commands.cancel import cancel
from kfac_dist.cli.commands.checkpoints import checkpoints
from kfac_dist.cli.commands.cluster import cluster_app
from kfac_dist.cli.commands.completion import completion
from kfac_dist.cli.commands.describe import describe
from kfac_dist.cli.commands.doctor import doctor
from kfac_dist.cli.commands.driver import driver
from kfac_dist.cli.commands.explain import explain
from kfac_dist.cli.commands.layers import layers
from kfac_dist.cli.commands.list_jobs import list_jobs
from kfac_dist.cli.commands.logs import logs
from kfac_dist.cli.commands.metrics import metrics
from kfac_dist.cli.commands.pause import pause
from kfac_dist.cli.commands.plan import plan
from kfac_dist.cli.commands.replay import replay
from kfac_dist.cli.commands.resume import resume
from kfac_dist.cli.commands.retry import retry
from kfac_dist.cli.commands.scale import scale
from kfac_dist.cli.commands.schema import spec_app
from kfac_dist.cli.commands.serve import serve
from kfac_dist.cli.commands.submit import submit
from kfac_dist.cli.commands.token import token_app
from kfac_dist.cli.commands.train import train
from kfac_dist.cli.commands.validate import validate
from kfac_dist.cli.commands.watch import watch
from kfac_dist.cli.failure import INTERRUPTED, as_exit_code, output_closed

app = typer.Typer(
    name="kfac-dist",
    help="Train neural networks with distributed K-FAC.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 ok, 1 job failed, 2 usage, 3 invalid specification, 4 not found, "
        "5 unreachable, 6 not allowed, 7 timed out, 8 cancelled, 9 conflict, 70 bug, "
        "130 interrupted."
    ),
)
_HERE = "On this machine"
_JOBS = "Jobs on a server"
_SERVER = "The server"
_LOCAL: tuple[Callable[..., None], ...] = (
    train,
    replay,
    validate,
    plan,
    layers,
    doctor,
    completion,
)
_REMOTE: tuple[Callable[..., None], ...] = (
    submit,
    describe,
    logs,
    watch,
    metrics,
    cancel,
    pause,
    resume,
    retry,
    scale,
    checkpoints,
    explain,
)
for command in _LOCAL:
    app.command(rich_help_panel=_HERE)(command)
app.add_typer(spec_app, rich_help_panel=_HERE)
app.command("list", rich_help_panel=_JOBS)(list_jobs)
for command in _REMOTE:
    app.command(rich_help_panel=_JOBS)(command)
app.command(rich_help_panel=_SERVER)(serve)
for group in (token_app, cluster_app):
    app.add_typer(group, rich_help_panel=_SERVER)
app.command(hidden=True)(driver)


def _reflow_help(commands: typer.Typer) -> None:
    """Join the lines of each paragraph of help, which typer would break where the source does."""
    for command in commands.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for group in (app, spec_app, token_app, cluster_app):
    _reflow_help(group)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kfac-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train neural networks with distributed K-FAC."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line, given without the program's name, and return its exit code."""
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="kfac-dist", standalone_mode=False)
    except SystemExit:
        code = output_closed()  # typer exits with 1 on a broken pipe
        if code is None:
            raise
        return code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every error becomes a message
        return as_exit_code(error, arguments)
    if code == INTERRUPTED:  # typer turns a KeyboardInterrupt into this exit code
        return as_exit_code(KeyboardInterrupt(), arguments)
    return int(code or 0)
