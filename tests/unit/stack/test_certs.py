"""The certificate for trying HTTPS out."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from extproc.stack import certs


def names(file: Path) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_the_key_is_readable_for_its_owner_alone(tmp_path: Path) -> None:
    pair = certs.make(tmp_path / "new")
    assert stat.S_IMODE(pair.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(pair.key.parent.stat().st_mode) == 0o700
    assert sorted(file.name for file in pair.key.parent.iterdir()) == ["ca.pem", "tls.crt", "tls.key"]


def test_the_authoritys_key_is_written_nowhere(tmp_path: Path) -> None:
    pair = certs.make(tmp_path)
    assert [file for file in pair if b"PRIVATE KEY" in file.read_bytes()] == [pair.key]


def test_key_and_certificate_belong_together_and_are_signed_by_the_authority(tmp_path: Path) -> None:
    pair = certs.make(tmp_path)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.chain, pair.key)
    authority, leaf = (x509.load_pem_x509_certificate(file.read_bytes()) for file in (pair.authority, pair.chain))
    leaf.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_it_is_for_the_hosts_and_for_about_a_year(tmp_path: Path) -> None:
    pair = certs.make(tmp_path, ["gateway.lan", "10.0.0.1", "::1"])
    assert names(pair.chain).get_values_for_type(x509.DNSName) == ["gateway.lan"]
    assert [str(one) for one in names(pair.chain).get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    ends = x509.load_pem_x509_certificate(pair.chain.read_bytes()).not_valid_after_utc
    assert timedelta(days=360) < ends - datetime.now(UTC) < timedelta(days=398)


@pytest.mark.parametrize("host", ["", "münchen.example"])
def test_a_host_that_is_none_is_an_error(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        certs.make(tmp_path, [host])
    assert not list(tmp_path.iterdir())


class TestMakeOrKeep:
    def test_a_good_one_is_kept(self, tmp_path: Path) -> None:
        first = certs.make_or_keep(tmp_path).chain.read_bytes()
        assert certs.make_or_keep(tmp_path).chain.read_bytes() == first

    def test_one_for_other_hosts_is_replaced(self, tmp_path: Path) -> None:
        certs.make_or_keep(tmp_path)
        pair = certs.make_or_keep(tmp_path, ["gateway.lan"])
        assert names(pair.chain).get_values_for_type(x509.DNSName) == ["gateway.lan"]

    def test_one_that_ends_soon_is_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(certs, "VALID_FOR", timedelta(days=6))
        first = certs.make(tmp_path).chain.read_bytes()
        monkeypatch.undo()
        assert certs.make_or_keep(tmp_path).chain.read_bytes() != first

    @pytest.mark.parametrize("missing", ["ca.pem", "tls.crt", "tls.key"])
    def test_one_with_a_file_missing_is_replaced(self, tmp_path: Path, missing: str) -> None:
        certs.make(tmp_path)
        (tmp_path / missing).unlink()
        pair = certs.make_or_keep(tmp_path)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.chain, pair.key)
        assert pair.authority.is_file()

    @pytest.mark.parametrize("content", [b"", b"nonsense"])
    def test_one_that_is_none_is_replaced(self, tmp_path: Path, content: bytes) -> None:
        pair = certs.make(tmp_path)
        pair.chain.write_bytes(content)
        assert certs.make_or_keep(tmp_path).chain.read_bytes() != content
