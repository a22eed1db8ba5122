"""The commands on a machine whose environment names a proxy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_dist.service.job_records import Role
from tests.cli.conftest import KfacDist
from tests.recording_proxy import recording_proxy
from tests.service.serving import serving


def test_every_verb_reaches_the_local_server_and_nothing_reaches_the_proxy(
    tmp_path: Path, kfac_dist: KfacDist, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_proxy(monkeypatch) as proxy, serving(tmp_path / "server") as server:
        monkeypatch.setenv("KFAC_DIST_SERVER", server.address)
        monkeypatch.setenv("KFAC_DIST_TOKEN", server.token("ada", Role.SUBMITTER))
        job = json.loads(kfac_dist("submit", spec, "-o", "json").out)["job"]
        for verb in ("describe", "metrics", "checkpoints", "explain", "pause", "resume", "cancel"):
            done = kfac_dist(verb, job)
            assert done.code == 0, (verb, done.err)
        for arguments in (["list"], ["logs", job, "-f"], ["watch", job], ["retry", job]):
            done = kfac_dist(*arguments)
            assert done.code == 0, (arguments, done.err)
    assert proxy.received == []
