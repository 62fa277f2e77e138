"""Identities: known answers of RFC 8032, key files that others can read, keys of another kind."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from medfed.errors import ConfigError, EnvironmentFault, MedfedError, RemoteProtocolError
from medfed.identity import (
    Identity,
    check_node_key,
    check_public,
    create_identity,
    create_node_key,
    fingerprint,
    load_identity,
    verify,
)
from medfed.seams import SystemEntropy, SystemFiles

FILES = SystemFiles()

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature
KNOWN = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
        "c027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), KNOWN)
def test_signature_is_the_one_of_rfc_8032(seed: str, public: str, message: str, signature: str) -> None:
    identity = Identity.from_seed(bytes.fromhex(seed))
    assert identity.public.hex() == public
    assert identity.sign(bytes.fromhex(message)).hex() == signature
    verify(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message))


def test_signature_of_other_data_key_or_length_is_refused() -> None:
    identity, other = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2))
    signature = identity.sign(b"data")
    verify(identity.public, signature, b"data")
    for public, signed, data in (
        (identity.public, signature, b"dat"),
        (other.public, signature, b"data"),
        (identity.public, signature[:-1], b"data"),
        (identity.public, signature + b"\0", b"data"),
        (identity.public, b"", b"data"),
        (identity.public[:31], signature, b"data"),
        (b"\xff" * 32, signature, b"data"),
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            verify(public, signed, data)
        assert caught.value.code == 110


P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def small_order_points() -> set[tuple[int, int]]:
    """All (x, y) of -x^2 + y^2 = 1 + d x^2 y^2 with 8 (x, y) = (0, 1), found by adding one of order 8 to itself."""

    def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        product = D * a[0] * b[0] * a[1] * b[1] % P
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
        y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
        return x % P, y % P

    def root(square: int) -> int:
        found = pow(square, (P + 3) // 8, P)
        return found if found * found % P == square % P else found * pow(2, (P - 1) // 4, P) % P

    # order 8 doubles to order 4, (+-i, 0): y^2 = -x^2 there, so d x^4 - 2 x^2 - 1 = 0
    for sign in (1, -1):
        x = root((1 + sign * root(1 + D)) * pow(D, -1, P))
        if (D * x**4 - 2 * x**2 - 1) % P == 0:
            break
    else:
        raise AssertionError("no point of order 8")
    point, points = (x, root(-x * x)), set[tuple[int, int]]()
    each = point
    for _ in range(8):
        points.add(each)
        each = add(each, point)
    return points


def encodings_of_small_order() -> set[bytes]:
    """Every 32 bytes that some library reads as one of them: either sign bit, y or y + p where that fits in 255 bits."""
    return {
        (value | sign << 255).to_bytes(32, "little")
        for _, y in small_order_points()
        for value in (y, y + P)
        if value < 1 << 255
        for sign in (0, 1)
    }


def test_keys_of_small_order_are_refused_in_all_encodings() -> None:
    assert len(small_order_points()) == 8 and (0, 1) in small_order_points()
    assert len(encodings_of_small_order()) == 14
    for public in encodings_of_small_order():
        with pytest.raises(RemoteProtocolError) as caught:
            check_public(public)
        assert caught.value.code == 170


def test_real_keys_are_not_refused() -> None:
    for public in [bytes.fromhex(public) for _, public, _, _ in KNOWN]:
        check_public(public)
    for seed in range(50):
        check_public(Identity.from_seed(bytes([seed]) * 32).public)


def test_anybody_signs_for_a_key_of_small_order() -> None:
    """The positive control: without ``check_public`` such a key is as good as any."""
    neutral = (1).to_bytes(32, "little")
    verify(neutral, neutral + bytes(32), b"whatever")


def test_repr_shows_no_secret() -> None:
    identity = Identity.from_seed(bytes(32))
    assert repr(identity) == f"Identity(public={identity.public!r})"


def test_fingerprint_is_the_published_form() -> None:
    text = fingerprint(b"")
    assert text.startswith("e3b0 c442 98fc 1c14 9afb f4c8")
    assert [len(group) for group in text.split(" ")] == [4] * 16


# ------------------------------------------------------------------------------------------------------------- files


def test_identity_made_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = create_identity(FILES, path, SystemEntropy())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_identity(FILES, path).public == made.public
    load_identity(FILES, path).sign(b"x")


def test_two_identities_differ(tmp_path: Path) -> None:
    first, second = (create_identity(FILES, tmp_path / name, SystemEntropy()) for name in ("a", "b"))
    assert first.public != second.public


def test_identity_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    create_identity(FILES, path, SystemEntropy())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="MF-212"):
        create_identity(FILES, path, SystemEntropy())
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="MF-212"):
        create_node_key(FILES, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o666, 0o610, 0o601, 0o700])
def test_identity_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    create_identity(FILES, path, SystemEntropy())
    path.chmod(mode)
    with pytest.raises(EnvironmentFault, match="chmod 600") as caught:
        load_identity(FILES, path)
    assert caught.value.code == 210


def private(path: Path, data: bytes) -> Path:
    FILES.write(path, data, private=True)
    return path


def pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_unusable_key_files_are_one_line(tmp_path: Path) -> None:
    ed25519 = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = ed25519.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    whole = pem(ed25519)
    for name, data in {
        "empty": b"",
        "text": b"no key at all",
        "binary": bytes(range(256)),
        "curve": pem(ec.generate_private_key(ec.SECP256R1())),
        "passphrase": pem(ed25519, b"secret"),
        "public": public,
        "cut": whole[: len(whole) // 2],
    }.items():
        with pytest.raises(EnvironmentFault) as caught:
            load_identity(FILES, private(tmp_path / name, data))
        assert caught.value.code == 211, name
        assert "\n" not in str(caught.value)


def test_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="MF-606"):
        load_identity(FILES, tmp_path / "identity.key")


# ---------------------------------------------------------------------------------------------------------- node key


def test_node_key_made_is_a_p384_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    public = create_node_key(FILES, path)
    assert public.startswith("ecdsa-sha2-nistp384 ")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    check_node_key(public)


def test_node_key_of_another_kind_is_refused() -> None:
    def openssh(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> str:
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    good = openssh(ec.generate_private_key(ec.SECP384R1()))
    check_node_key(good)
    for bad in (
        "",
        "ssh-rsa",
        "ecdsa-sha2-nistp384 AAAA",
        good[:60],
        openssh(Ed25519PrivateKey.generate()),
        openssh(ec.generate_private_key(ec.SECP256R1())),
    ):
        with pytest.raises(MedfedError) as caught:
            check_node_key(bad)
        assert caught.value.code == 211
