"""The signing key: only a private Ed25519 key in a file for its owner alone is used."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedota.kernel.settings import SettingsError
from services.problems.settings import read_token_key

KEY = Ed25519PrivateKey.generate()


def pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, behind: KeySerializationEncryption | None = None) -> bytes:
    """A private key as a file has it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, behind or NoEncryption())


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    """A file with this content and mode."""
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_good_key_is_read_and_stays_hidden(tmp_path: Path) -> None:
    """The key is there for signing, and not for logs."""
    key = read_token_key(write(tmp_path / "key.pem", pem(KEY)))
    assert key.reveal().encode() == pem(KEY)
    assert "PRIVATE" not in repr(key)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o610])
def test_a_key_that_others_may_reach_is_refused(tmp_path: Path, mode: int) -> None:
    """And the refusal says what to do."""
    path = write(tmp_path / "key.pem", pem(KEY), mode)
    with pytest.raises(SettingsError, match=f"chmod 600 {path}"):
        read_token_key(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(KEY, BestAvailableEncryption(b"password")),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    """A key that cannot sign tokens stops the start, not the first token."""
    with pytest.raises(SettingsError, match="no private Ed25519 key"):
        read_token_key(write(tmp_path / "key.pem", content))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """The path is in the words."""
    with pytest.raises(SettingsError, match=r"key\.pem cannot be read"):
        read_token_key(tmp_path / "key.pem")
