"""Drivers and local commands at a server that asks clients for a certificate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState
from kfac_dist.coordination.jobs.supervision import WaitLimits
from kfac_dist.errors import NotFoundError, UsageError
from kfac_dist.service.access.local import ensure_local_token, local_server, write_server
from kfac_dist.service.access.tls import TlsFiles
from kfac_dist.service.control.controller import Controller
from kfac_dist.service.server.serving import ServerOptions
from tests.cli.conftest import KfacDist
from tests.service.authority import Authority
from tests.service.requests import spec
from tests.service.serving import serving
from tests.service.subprocess_runner import SubprocessRunner
from tests.waiting import wait_until


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    """Files of a server whose own certificate is not valid for clients."""
    public, own = Authority(tmp_path / "public", "public"), Authority(tmp_path / "own", "own")
    server, driver = public.sign("server", for_clients=False), own.sign("driver")
    return TlsFiles(
        certificate=server.certificate,
        key=server.key,
        ca=public.ca,
        client_ca=own.ca,
        driver_certificate=driver.certificate,
        driver_key=driver.key,
    )


@pytest.mark.timeout(300)
def test_drivers_report_and_commands_get_through(
    tls: TlsFiles, home: Path, kfac_dist: KfacDist
) -> None:
    tls.check_shown()
    runner = SubprocessRunner()
    with serving(home, ServerOptions(host="127.0.0.1", port=0, tls=tls)) as server:
        write_server(home, local_server(server.address, tls))
        ensure_local_token(home, server.tokens)
        # Longer than the test waits, so that no driver is taken for dead on a busy machine.
        controller = Controller(server.jobs, runner, WaitLimits(silence_seconds=200.0))
        controller.start()
        try:
            job = server.jobs.create(spec(steps=20, task_args={"seconds": 0.05}), owner="ada")
            wait_until(lambda: server.jobs.get(job.id).state in ENDED, "the end", seconds=150.0)
            assert server.jobs.get(job.id).state is JobState.SUCCEEDED
            (attempt,) = server.jobs.attempts(job.id)
            assert attempt.heard_at is not None
            done = kfac_dist("describe", job.id)
            assert (done.code, job.id in done.out) == (0, True), done.err
        finally:
            controller.stop()
            runner.close()


def test_serve_refuses_files_that_would_turn_drivers_away(
    tls: TlsFiles, tmp_path: Path, kfac_dist: KfacDist
) -> None:
    options = (
        ("--tls-cert", tls.certificate),
        ("--tls-key", tls.key),
        ("--client-ca", tls.client_ca),
    )
    words = [word for option in options for word in option]
    done = kfac_dist("serve", "--listen", "127.0.0.1:0", *words)
    assert (done.code, done.out) == (2, "")
    assert f"does not accept {tls.certificate}" in done.err
    assert "--driver-cert" in done.err
    alone = kfac_dist("serve", *words, "--driver-cert", tls.driver_certificate)
    assert (alone.code, "go together" in alone.err) == (2, True)
    unasked = ("--driver-cert", tls.driver_certificate, "--driver-key", tls.driver_key)
    assert kfac_dist("serve", *words[:4], *unasked).code == 2
    assert kfac_dist("serve", *unasked).code == 2


def test_the_drivers_certificate_must_be_for_clients_and_of_the_right_authority(
    tls: TlsFiles, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority", "authority")
    both = authority.sign("both")
    TlsFiles(certificate=both.certificate, key=both.key, client_ca=authority.ca).check_shown()
    replace(tls, client_ca=None).check_shown()  # the server asks for no certificate
    servers = authority.sign("servers", for_clients=False)
    for made in (servers, Authority(tmp_path / "other", "other").sign("other")):
        shown = {"driver_certificate": made.certificate, "driver_key": made.key}
        with pytest.raises(UsageError, match="does not accept"):
            replace(tls, client_ca=authority.ca, **shown).check_shown()
    with pytest.raises(UsageError, match=r"both\.key: is not the key of --driver-cert"):
        replace(tls, driver_key=both.key).check_shown()
    with pytest.raises(NotFoundError, match=r"missing\.pem"):
        replace(tls, driver_certificate=tmp_path / "missing.pem").check_shown()
