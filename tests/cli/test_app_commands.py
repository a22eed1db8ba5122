"""Commands that run without workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

from kfac_dist.cli import doctor_checks as checks
from kfac_dist.cli.app import app
from kfac_dist.config import load_spec
from tests.cli.conftest import KfacDist

ROWS = [
    {
        "parameter": "layers.0.weight",
        "module": "layers.0",
        "kind": "Linear",
        "block": "kronecker",
        "num_blocks": 1,
        "dim_A": 785,
        "dim_G": 30,
        "num_parameters": 23520,
        "cost": 483763625,
        "why": "",
    },
    {
        "parameter": "layers.0.bias",
        "module": "layers.0",
        "kind": "Linear",
        "block": "frozen",
        "num_blocks": 0,
        "dim_A": 0,
        "dim_G": 0,
        "num_parameters": 30,
        "cost": 0,
        "why": "",
    },
]


def command_lines(group: Any, *words: str) -> Iterator[tuple[str, ...]]:
    """Every command line of `group`, those of its groups included."""
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from command_lines(command, *words, name)


@pytest.mark.parametrize("words", command_lines(get_command(app)), ids=" ".join)
def test_help_fits_80_columns(
    kfac_dist: KfacDist, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = kfac_dist(*words, "--help")
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines()) <= 80
    assert "…" not in done.out  # a word was too long for its column


def test_help_is_broken_into_lines_by_the_terminal_alone(kfac_dist: KfacDist) -> None:
    text = get_command(app).commands["serve"].help
    assert text.count("\n\n") >= 1
    assert "\n" not in text.replace("\n\n", "")


def test_no_command_is_help(kfac_dist: KfacDist) -> None:
    done = kfac_dist()
    assert done.code == 0
    assert "validate" in done.out


def test_validate_in_three_formats(kfac_dist: KfacDist, spec: Path) -> None:
    assert "digits  classifier" in kfac_dist("validate", spec).out
    resolved = load_spec(spec).model_dump(mode="json")
    as_json = kfac_dist("validate", spec, "-o", "json").out
    assert as_json.count("\n") == 1
    said = json.loads(as_json)
    assert (said["valid"], said["spec"]) == (True, resolved)
    assert len(said["not_checked"]) == 1
    assert "a training step" in said["not_checked"][0]
    assert yaml.safe_load(kfac_dist("validate", spec, "-o", "yaml").out)["spec"] == resolved


def test_a_dry_run_prints_what_would_run_and_writes_nothing(
    kfac_dist: KfacDist, spec: Path, home: Path
) -> None:
    done = kfac_dist("train", spec, "--dry-run", "--set", "steps=7", "-o", "json")
    result = json.loads(done.out)
    assert result["run_dir"] == str(home / "runs" / "digits")
    assert result["spec"]["steps"] == 7
    assert not home.exists()


def test_schema_is_json_schema_or_a_table_of_all_keys(kfac_dist: KfacDist) -> None:
    schema = json.loads(kfac_dist("spec", "schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert yaml.safe_load(kfac_dist("spec", "schema", "-o", "yaml").out) == schema
    table = kfac_dist("spec", "schema", "-o", "table").out
    for key in (
        "optimizer.damping.initial (kfac)",
        "optimizer.betas (adam)",
        "faults.max_restarts",
    ):
        assert key in table


def test_layers_shows_the_registration_report(
    kfac_dist: KfacDist, spec: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ModuleType("workers.api")
    asked = {}

    def layers_report(job: object, base_dir: Path, **places: Path | None) -> list[object]:
        asked.update(base_dir=base_dir, **places)
        return list(ROWS)

    vars(api)["layers_report"] = layers_report
    monkeypatch.setitem(sys.modules, "workers.api", api)
    table = kfac_dist("layers", spec, "--data-dir", spec.parent).out
    assert asked == {
        "base_dir": spec.parent,
        "data_dir": spec.parent,
        "cache_dir": home / "data",
    }
    assert "layers.0.weight" in table
    assert "total" in table
    result = json.loads(kfac_dist("layers", spec, "-o", "json").out)
    assert result == {"num_parameters": 23520, "layers": ROWS}


def test_doctor_reports_what_this_machine_has(
    kfac_dist: KfacDist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in checks._MNIST_FILES:
        (tmp_path / "mnist").mkdir(exist_ok=True)
        (tmp_path / "mnist" / f"{name}.gz").touch()
    monkeypatch.setenv("KFAC_DIST_DATA", str(tmp_path))
    done = kfac_dist("doctor", "-o", "json")
    assert done.code == 0
    result = json.loads(done.out)
    found = {check["name"]: check for check in result["checks"]}
    assert result["ok"] is True
    assert found["torch"]["found"].startswith("2.")
    assert found["data mnist"]["found"] == str(tmp_path / "mnist")
    assert found["home"]["status"] == "ok"


def test_doctor_exits_with_1_when_something_required_is_missing(
    kfac_dist: KfacDist, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_PACKAGES", ("torch", "no-such-package-here"))
    done = kfac_dist("doctor")
    assert done.code == 1
    assert "not installed" in done.out
    assert not home.exists()


def test_doctor_reports_a_home_that_cannot_be_written(kfac_dist: KfacDist, home: Path) -> None:
    home.touch()
    done = kfac_dist("doctor", "-o", "json")
    assert done.code == 1
    (check,) = [c for c in json.loads(done.out)["checks"] if c["name"] == "home"]
    assert check["status"] == "broken"
