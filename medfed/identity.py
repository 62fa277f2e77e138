"""Who signs what: Ed25519 identities of hospitals and coordinator, and the node key that Flower asks for.

Private keys lie in files of mode 0600 and are read through the file seam, which refuses any other mode.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from medfed.errors import ConfigError, EnvironmentFault, RemoteProtocolError
from medfed.seams import Entropy, Files

PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64

_PRIME = 2**255 - 19
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# the eight points of small order, by y: order 1, order 2, twice order 4, four times order 8
_SMALL_ORDER_Y = frozenset({1, _PRIME - 1, 0, _ORDER_8_Y, _PRIME - _ORDER_8_Y})


@dataclass(frozen=True, slots=True)
class Identity:
    """A private Ed25519 key. ``repr`` shows the public half only."""

    _key: Ed25519PrivateKey = field(repr=False)
    public: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte secret seed (RFC 8032)."""
        key = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(key, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def sign(self, data: bytes) -> bytes:
        """A deterministic 64-byte signature."""
        return self._key.sign(data)

    def private_pem(self) -> bytes:
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def verify(public: bytes, signature: bytes, data: bytes) -> None:
    """Raise ``RemoteProtocolError`` (MF-110) unless ``signature`` is the holder of ``public``'s over ``data``."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        raise RemoteProtocolError(110, "signature does not verify", "refused; ask the sender") from error


def check_public(public: bytes) -> None:
    """Raise ``RemoteProtocolError`` (MF-170) for an Ed25519 key of small order, in any of its encodings.

    It has no private half to keep: a signature that anybody can write down verifies over all data, or over one piece in
    two, four or eight. RFC 8032 (section 5.1.7) lets them pass; Chalkias, Garillot, Nikolaenko 2020, "Taming the many
    EdDSAs", section 2.
    """
    y = int.from_bytes(public, "little") & ((1 << 255) - 1)  # the top bit is the sign of x
    if len(public) != PUBLIC_BYTES or y % _PRIME in _SMALL_ORDER_Y:
        raise RemoteProtocolError(170, "an identity key is refused, anybody could sign for it", "ask for a real one")


def fingerprint(public: bytes) -> str:
    """What two people read to each other on the telephone: 64 hex digits of SHA-256 in groups of four."""
    digits = hashlib.sha256(public).hexdigest()
    return " ".join(digits[start : start + 4] for start in range(0, 64, 4))


def create_identity(files: Files, path: Path, entropy: Entropy) -> Identity:
    """Make a new identity and write it (mode 0600); an existing one is never overwritten (MF-212)."""
    if files.exists(path):
        raise ConfigError(212, f"{path.name} exists", "an identity is made once; move the old one away first")
    identity = Identity.from_seed(entropy.draw("identity", 32))
    files.write(path, identity.private_pem(), private=True)
    return identity


def load_identity(files: Files, path: Path) -> Identity:
    """Read an identity; MF-210 if others can read the file, MF-211 if it is no Ed25519 key."""
    try:
        key = load_pem_private_key(files.read_private(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnvironmentFault(211, f"{path.name} is not a usable private key", "restore it from backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise EnvironmentFault(211, f"{path.name} is not an Ed25519 key", "restore it from backup")
    return Identity(key, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def create_node_key(files: Files, path: Path) -> str:
    """Make the EC P-384 key with which Flower knows a node; returns the public half in OpenSSH form.

    It authenticates the connection only. What a hospital says is signed by its identity.
    """
    if files.exists(path):
        raise ConfigError(212, f"{path.name} exists", "a node key is made once; move the old one away first")
    key = ec.generate_private_key(ec.SECP384R1())
    files.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), private=True)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def check_node_key(public: str) -> None:
    """Raise ``ConfigError`` (MF-211) unless ``public`` is an EC P-384 key in OpenSSH form."""
    try:
        key = load_ssh_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError) as error:  # the last: a compressed point
        raise ConfigError(211, "node key is not an OpenSSH public key", "make the enrolment document anew") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ConfigError(211, "node key is not of curve P-384", "make the enrolment document anew")
