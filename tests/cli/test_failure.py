"""Every mistake has one message on stderr and its exit code; stdout stays clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_dist import errors
from kfac_dist.cli import app
from kfac_dist.cli.failure import as_exit_code
from tests.cli.conftest import KfacDist


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["trian"], 2, "Did you mean 'train'?"),
        (["train"], 2, "Missing argument 'SPEC'"),
        (["spec"], 2, "Missing command"),
        (["train", "{spec}", "--stes"], 2, "No such option: --stes"),
        (["validate", "{spec}", "-o", "xml"], 2, "'table', 'json', 'yaml'"),
        (["validate", "{spec}", "--set", "steps"], 2, "--set steps: must have the form key=value"),
        (["validate", "nowhere.yaml"], 4, "nowhere.yaml: the specification does not exist"),
        (["validate", "{spec}", "--set", "stpes=3"], 3, "stpes: unknown key. Did you mean steps?"),
        (["validate", "{spec}", "--set", "task=classifer"], 3, "Did you mean classifier?"),
        (["validate", "{spec}", "--set", "task_args.hiden=[3]"], 3, "Did you mean hidden?"),
        (["validate", "{spec}", "--set", "data.name=mnits"], 3, "Did you mean mnist?"),
        (["validate", "{spec}", "--set", "task=gone.py:Task"], 3, "gone.py"),
        (["train", "{spec}", "--resume", "--dry-run"], 4, "no run to resume here"),
        (["train", "{spec}", "--dry-run", "--set", "workers.gradient=4000"], 3, "4000 CPUs"),
        (["train", "{spec}", "--dry-run", "--set", "batch_size=9000"], 3, "9000"),
        (
            ["train", "{spec}", "--dry-run", "--set", "data.name=mnist", "--data-dir", "/nowhere"],
            4,
            "/nowhere",
        ),
    ],
)
def test_message_and_exit_code(
    kfac_dist: KfacDist, spec: Path, arguments: list[str], code: int, part: str
) -> None:
    done = kfac_dist(*(argument.format(spec=spec) for argument in arguments))
    assert done.code == code
    assert part in done.err
    assert done.out == ""
    assert all(line.startswith("error: ") for line in done.err.splitlines())


def test_validation_reports_all_problems_each_on_a_line(
    kfac_dist: KfacDist, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: a b\nsteps: '3'\noptimizer: {dampin: 1}\n")
    done = kfac_dist("validate", path)
    assert done.code == 3
    assert len(done.err.splitlines()) == 5  # three wrong keys, two missing ones


def test_a_syntax_error_has_line_and_column(kfac_dist: KfacDist, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: [a\nsteps: 3\n")
    done = kfac_dist("validate", path)
    assert done.code == 3
    assert done.err.startswith("error: bad.yaml:2:6: ")


@pytest.mark.parametrize("option", [["-o", "json"], ["--output", "json"], ["-ojson"]])
def test_with_json_the_error_is_an_object_on_stderr(kfac_dist: KfacDist, option: list[str]) -> None:
    done = kfac_dist("validate", "nowhere.yaml", *option)
    assert done.out == ""
    assert json.loads(done.err) == {
        "error": {
            "type": "NotFoundError",
            "message": "nowhere.yaml: the specification does not exist",
            "exit_code": 4,
        }
    }


def test_every_error_of_the_tree_has_its_documented_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = {
        errors.JobFailedError: 1,
        errors.WorkerDiedError: 1,
        errors.UsageError: 2,
        errors.InvalidSpecError: 3,
        errors.DataNotFoundError: 4,
        errors.UnreachableError: 5,
        errors.NotAllowedError: 6,
        errors.TimedOutError: 7,
        errors.CancelledError: 8,
        errors.ConflictError: 9,
    }
    for kind, code in codes.items():
        assert as_exit_code(kind("what happened"), []) == code
        assert capsys.readouterr().err == "error: what happened\n"


def test_a_bug_writes_its_traceback_to_a_file(
    kfac_dist: KfacDist, home: Path, monkeypatch: pytest.MonkeyPatch, spec: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("kfac_dist.config.load_spec", broken)
    done = kfac_dist("validate", spec)
    assert done.code == 70
    assert done.err.startswith("error: internal error (ZeroDivisionError: oh); please report it")
    assert "Traceback" not in done.err
    (report,) = (home / "crashes").iterdir()
    assert str(report) in done.err
    assert "in broken" in report.read_text()


def test_a_bug_is_reported_even_if_the_home_cannot_be_written(
    kfac_dist: KfacDist, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.touch()  # a file stands where the folder should be

    def broken(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app, "app", broken)
    assert kfac_dist("doctor").code == 70


def test_a_full_disk_is_not_a_bug(kfac_dist: KfacDist, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(app, "app", full)
    done = kfac_dist("doctor")
    assert done.code == 1
    assert "No space left on device: metrics.jsonl" in done.err


@pytest.mark.parametrize(("arguments", "code"), [(("spec", "schema"), 0), (("trian",), 2)])
def test_a_reader_that_goes_away_is_no_error(arguments: tuple[str, ...], code: int) -> None:
    """As `kfac-dist spec schema | head -1`, and `kfac-dist trian 2>&1 | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kfac_dist.cli", *arguments]
    is_output = code == 0
    done = subprocess.run(
        command,
        stdout=writer if is_output else subprocess.PIPE,
        stderr=subprocess.PIPE if is_output else writer,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.returncode == code
    assert not done.stdout
    assert not done.stderr
