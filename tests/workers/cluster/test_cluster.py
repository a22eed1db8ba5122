"""The environment in which Ray is started."""

from __future__ import annotations

import os

import pytest

from workers.cluster.cluster import _environment


def test_rays_processes_reach_each_other_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", ".corp")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with _environment({}):
        assert os.environ["no_proxy"].split(",")[:2] == [".corp", "127.0.0.1"]
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    assert os.environ["no_proxy"] == ".corp"
    assert "NO_PROXY" not in os.environ
