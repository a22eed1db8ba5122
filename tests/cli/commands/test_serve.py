"""`serve` looks at the addresses and files that it was given before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.errors import UsageError
from tests.cli.conftest import KfacDist
from tests.service.authority import Authority
from tests.workers.cluster.jobs_api_server import jobs_api


def test_an_address_without_a_scheme_ends_serve(kfac_dist: KfacDist) -> None:
    done = kfac_dist("serve", "--listen", "127.0.0.1:0", "--ray-address", "127.0.0.1:8265")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --ray-address 127.0.0.1:8265: needs the URL of a cluster's")


def test_an_expired_certificate_and_a_foreign_key_end_serve(
    tmp_path: Path, kfac_dist: KfacDist
) -> None:
    authority = Authority(tmp_path)
    old, good = authority.sign("old", valid_hours=(-9, -1)), authority.sign("good")
    start = ("serve", "--listen", "127.0.0.1:0", "--tls-cert")
    expired = kfac_dist(*start, old.certificate, "--tls-key", old.key)
    assert (expired.code, "old.pem: has expired; renew it" in expired.err) == (2, True)
    foreign = kfac_dist(*start, good.certificate, "--tls-key", old.key)
    assert (foreign.code, "old.key: is not the key of --tls-cert" in foreign.err) == (2, True)


def test_a_cluster_that_is_none_is_refused_and_one_that_is_away_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kfac_dist.cli.commands.serve import _check_ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with jobs_api() as api:
        api.version = {}
        with pytest.raises(UsageError, match="is not Ray's Jobs API"):
            _check_ray(api.url)
    _check_ray(api.url)
    assert capsys.readouterr().err == (
        f"warning: --ray-address {api.url}: nobody answers there; jobs wait until a cluster "
        "answers\n"
    )
