"""Python and Ray are compared with the versions that kfac-dist is meant for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kfac_dist.cli import doctor_checks
from kfac_dist.cli.doctor_checks import Check, all_checks
from kfac_dist.supported import RAY


def found(name: str, home: Path) -> Check:
    (check,) = [check for check in all_checks(home, None) if check.name == name]
    return check


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 14), "broken"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")]
)
def test_python_has_an_oldest_version_and_no_newest(
    version: tuple[int, ...], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "version", f"{'.'.join(map(str, version))} (main)")
    check = found("python", tmp_path)
    assert check.status == status
    assert check.found == f"{'.'.join(map(str, version))} (supported: 3.11 and newer)"
    assert check.advice == ("kfac-dist needs Python 3.11 or newer" if status == "broken" else "")


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.52.1", "broken"), ("2.53.0", "ok"), ("2.60.0", "ok"), ("2.61.0", "broken")],
)
def test_ray_has_a_range(
    version: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "_version", lambda _package: version)
    check = found("ray", tmp_path)
    assert (check.status, check.found) == (status, f"{version} (supported: {RAY})")
    assert (f"install Ray {RAY}" in check.advice) is (status == "broken")


def test_without_ray_no_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_version", lambda _package: None)
    check = found("ray", tmp_path)
    assert (check.status, check.found) == ("broken", "not installed")
