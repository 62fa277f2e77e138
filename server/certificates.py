"""The coordinator's certificates: a private authority and the TLS certificate that hospitals check.

The authority's certificate goes to every hospital out of band, so no public authority can speak for the
coordinator. Its key is needed for renewal only and may lie offline.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfed.errors import ConfigError, EnvironmentFault
from medfed.seams import Clock, Files

AUTHORITY_DAYS = 3650
SERVER_DAYS = 398
WARN_DAYS = 30
_AUTHORITY_NAME = "medfed coordinator authority"


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where the four files lie; keys are written with mode 0600."""

    authority: Path
    authority_key: Path
    certificate: Path
    key: Path


def create_authority(files: Files, paths: CertificateFiles, clock: Clock) -> None:
    """Make the authority: EC P-384, ten years. Never overwrites one (MF-212)."""
    _refuse_existing(files, paths.authority, paths.authority_key)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(_AUTHORITY_NAME, key.public_key(), clock, AUTHORITY_DAYS)
        .issuer_name(_name(_AUTHORITY_NAME))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_authority_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    files.write(paths.authority_key, _private_pem(key), private=True)
    files.write(paths.authority, certificate.public_bytes(Encoding.PEM))


def check_host_names(hosts: Sequence[str]) -> None:
    """Raise MF-203 for an empty list or a name that cannot stand in a certificate."""
    _subject_names(hosts)


def create_server_certificate(files: Files, paths: CertificateFiles, hosts: Sequence[str], clock: Clock) -> None:
    """Issue the TLS certificate (EC P-256, 398 days) for every name and address in ``hosts``; replaces an older one.

    Hospitals compare the name they connect to with this list, so all of them must be in it. Raises ``ConfigError``
    (MF-203) for an empty list or a name that cannot stand in a certificate.
    """
    names = _subject_names(hosts)
    authority_key = _load_key(files, paths.authority_key)
    authority = _load_certificate(files.read(paths.authority, limit_bytes=1 << 20), paths.authority)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(hosts[0][:64], key.public_key(), clock, SERVER_DAYS)
        .issuer_name(authority.subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    files.write(paths.key, _private_pem(key), private=True)
    files.write(paths.certificate, certificate.public_bytes(Encoding.PEM))


def check_server_certificate(files: Files, certificate: Path, key: Path, authority: Path, clock: Clock) -> str:
    """Check before a port opens that hospitals will accept this certificate; returns the authority as PEM text.

    Raises ``EnvironmentFault``: MF-612 outside its validity or not issued by ``authority``, MF-211 if it does not
    belong to ``key`` or is no certificate, MF-210 if others can read the key.
    """
    own_key = _load_key(files, key)
    own = _load_certificate(files.read(certificate, limit_bytes=1 << 20), certificate)
    authority_text = files.read(authority, limit_bytes=1 << 20)
    issuer = _load_certificate(authority_text, authority)
    if own.public_key() != own_key.public_key():
        raise EnvironmentFault(211, f"{certificate.name} is not the certificate of {key.name}", "issue it anew")
    try:
        own.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise EnvironmentFault(612, f"{certificate.name} is not issued by {authority.name}", "issue it anew") from error
    for name, each in ((certificate.name, own), (authority.name, issuer)):
        if days_left(each, clock) < 0:
            raise EnvironmentFault(612, f"{name} expired on {each.not_valid_after_utc:%Y-%m-%d}", "renew it")
        if each.not_valid_before_utc > _now(clock):
            raise EnvironmentFault(612, f"{name} is not valid yet", "check this machine's clock")
    return authority_text.decode()


def certificate_days_left(files: Files, certificate: Path, clock: Clock) -> float:
    """Days until a certificate expires, negative after: for status and for a warning below ``WARN_DAYS``."""
    return days_left(_load_certificate(files.read(certificate, limit_bytes=1 << 20), certificate), clock)


def days_left(certificate: x509.Certificate, clock: Clock) -> float:
    """Days until ``certificate`` expires."""
    return (certificate.not_valid_after_utc - _now(clock)).total_seconds() / 86400


def _now(clock: Clock) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(clock.wall(), datetime.UTC)


def _refuse_existing(files: Files, *paths: Path) -> None:
    for path in paths:
        if files.exists(path):
            raise ConfigError(212, f"{path.name} exists", "an authority is made once; move the old one away first")


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_key(files: Files, path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(files.read_private(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnvironmentFault(211, f"{path.name} is not a usable private key", "restore it from backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnvironmentFault(211, f"{path.name} is not an elliptic curve key", "use the one medfed-server made")
    return key


def _load_certificate(data: bytes, path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise EnvironmentFault(211, f"{path.name} is not a certificate in PEM form", "name the right file") from error


def _subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise ConfigError(203, "no host name for the certificate", "name every host name and address hospitals use")
    return [_subject_name(host) for host in hosts]


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > 253 or not all(0 < len(label) < 64 and label.replace("-", "").isalnum() for label in labels):
        raise ConfigError(203, "a host name is not one", "give names like fl.example.org, without port or scheme")
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(203, "a host name is not plain ASCII", "give its punycode form (xn--...)") from error


def _builder(subject: str, key: ec.EllipticCurvePublicKey, clock: Clock, days: int) -> x509.CertificateBuilder:
    """All but issuer and extensions; valid from five minutes ago for slow clocks."""
    now = _now(clock)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _authority_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
