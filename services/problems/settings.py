"""What the problems service is told."""

from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedota.kernel.settings import ProcessSettings, Secret, SettingsError


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """`token_key_file` (mode 0600) holds the key, PEM and Ed25519, that participation tokens are signed with.

    A token is good for `token_days`.
    """

    token_key_file: Path
    token_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30


def read_token_key(path: Path) -> Secret:
    """The signing key in a file. Raises `SettingsError` when it is not one, or when others may read it."""
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"Others may read the token key file {path}. Run: chmod 600 {path}")
        pem = path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"The token key file {path} cannot be read: {error.strerror}. Set token_key_file."
        ) from None
    if not _is_ed25519(pem):
        raise SettingsError(
            f"The token key file {path} holds no private Ed25519 key. Make one: openssl genpkey -algorithm ed25519"
        )
    return Secret(pem.decode())


def _is_ed25519(pem: bytes) -> bool:
    try:
        return isinstance(load_pem_private_key(pem, password=None), Ed25519PrivateKey)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # no PEM at all, or one behind a password
        return False
