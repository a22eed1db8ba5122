"""Certificates and keys that no client could use are refused before a server starts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kfac_dist.errors import NotFoundError, UsageError
from kfac_dist.service.access.tls import TlsFiles, check_pair
from tests.service.authority import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("with_ca", [False, True])
@pytest.mark.parametrize(
    ("hours", "message"),
    [((-9, -1), "has expired; renew it"), ((1, 9), "is not valid yet; look at the clock")],
)
def test_a_certificate_outside_its_time_is_refused(
    authority: Authority, hours: tuple[float, float], message: str, with_ca: bool
) -> None:
    made = authority.sign("old", valid_hours=hours)
    files = TlsFiles(
        certificate=made.certificate, key=made.key, ca=authority.ca if with_ca else None
    )
    with pytest.raises(UsageError, match=f"--tls-cert .*old.pem: {message}"):
        files.check()


def test_a_certificate_that_ends_soon_is_a_warning(authority: Authority) -> None:
    soon = authority.sign("soon", valid_hours=(-1, 24))
    (warning,) = TlsFiles(certificate=soon.certificate, key=soon.key).check()
    assert "soon.pem: expires on 20" in warning
    later = authority.sign("later", valid_hours=(-1, 24 * 15))
    assert TlsFiles(certificate=later.certificate, key=later.key, ca=authority.ca).check() == []


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    one, other = authority.sign("one"), authority.sign("other")
    with pytest.raises(UsageError, match=r"--tls-key .*other.key: is not the key of --tls-cert "):
        TlsFiles(certificate=one.certificate, key=other.key).check()
    files = TlsFiles(
        certificate=one.certificate,
        key=one.key,
        client_ca=authority.ca,
        driver_certificate=other.certificate,
        driver_key=one.key,
    )
    with pytest.raises(UsageError, match=r"--driver-key .*one.key: is not the key of --driver-cer"):
        files.check_shown()


def test_an_authority_that_did_not_sign_is_refused(authority: Authority, tmp_path: Path) -> None:
    made = authority.sign("server")
    other = Authority(tmp_path / "other", "other")
    with pytest.raises(UsageError, match=r"--tls-cert .*clients that trust --tls-ca .*other.pem"):
        TlsFiles(certificate=made.certificate, key=made.key, ca=other.ca).check()


def test_files_that_are_no_certificate_or_no_key_are_refused(
    authority: Authority, tmp_path: Path
) -> None:
    made = authority.sign("server")
    with pytest.raises(NotFoundError, match="No such file"):
        check_pair(tmp_path / "none", made.key, "--tls-cert", "--tls-key")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nhello\n-----END CERTIFICATE-----\n")
    for pair in ((broken, made.key), (made.certificate, broken), (made.key, made.certificate)):
        with pytest.raises(UsageError, match=r"--tls-cert .* and --tls-key .*: cannot be used"):
            check_pair(*pair, "--tls-cert", "--tls-key")
    files = TlsFiles(certificate=made.certificate, key=made.key, ca=broken)
    with pytest.raises(UsageError, match=r"--tls-ca .*: cannot be used"):
        files.check()


def test_a_key_with_a_password_is_refused_without_asking_for_it(
    authority: Authority, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    made = authority.sign("server")
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-in", made.key, "-aes256", "-passout", "pass:abcd", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UsageError, match=r"--tls-key .*: is encrypted with a password"):
        check_pair(made.certificate, locked, "--tls-cert", "--tls-key")
