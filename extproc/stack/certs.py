"""A certificate for trying HTTPS out: signed by an authority that is made for it and signs nothing else.

The authority's key is never written, so who trusts `ca.pem` trusts this one certificate. For real traffic take one from
your own authority.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["LOOPBACK", "Pair", "make", "make_or_keep"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
VALID_FOR = timedelta(days=365)
"""Clients refuse server certificates that are valid for more than 398 days (CA/Browser Forum)."""
RENEW_BEFORE = timedelta(days=7)
CLOCKS_DIFFER = timedelta(minutes=5)


class Pair(NamedTuple):
    """PEM files; the names of certificate and key are those of a Kubernetes TLS secret."""

    authority: Path
    """What clients have to trust."""
    chain: Path
    key: Path
    """Mode 0600, PKCS #8, not encrypted."""

    @classmethod
    def within(cls, directory: Path) -> Pair:
        return cls(directory / "ca.pem", directory / "tls.crt", directory / "tls.key")


def make_or_keep(directory: Path, hosts: Sequence[str] = LOOPBACK) -> Pair:
    """The pair in `directory`; a new one when there is none, or it ends soon, or is not for all of `hosts`.

    Raises OSError, ValueError for a host that is no name or address.
    """
    pair = Pair.within(directory)
    if all(file.is_file() for file in pair) and _is_good(pair.chain, hosts):
        return pair
    return make(directory, hosts)


def make(directory: Path, hosts: Sequence[str] = LOOPBACK) -> Pair:
    """Write a new authority, certificate and key. Raises OSError, ValueError for a host that is no name or address."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _sign(
        _builder("IBEX gateway, local authority", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True),
        "IBEX gateway, local authority",
        authority_key,
    )
    leaf = _sign(
        _builder(hosts[0], key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False),
        "IBEX gateway, local authority",
        authority_key,
    )
    pem, pair = serialization.Encoding.PEM, Pair.within(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _replace(pair.key, secret, 0o600)
    _replace(pair.authority, authority.public_bytes(pem), 0o644)
    _replace(pair.chain, leaf.public_bytes(pem), 0o644)
    return pair


def _builder(subject: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_distinguished(subject))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _sign(builder: x509.CertificateBuilder, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    named = builder.issuer_name(_distinguished(issuer)).add_extension(identifier, critical=False)
    return named.sign(key, hashes.SHA256())


def _distinguished(common_name: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name[:64])])  # RFC 5280: 64 at most


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _is_good(file: Path, hosts: Sequence[str]) -> bool:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    is_for_all = all(_name(host) in names for host in hosts)
    return is_for_all and certificate.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE


def _replace(file: Path, content: bytes, mode: int) -> None:
    """In one step: nobody reads half of it, and a key is never readable for others, not even for a moment."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
        opened.write(content)
    fresh.replace(file)
