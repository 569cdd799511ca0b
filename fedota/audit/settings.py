"""What the notary and the auditor are told."""

from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedota.audit import checkpoints
from fedota.audit.store import Place
from fedota.kernel.settings import LogSettings, Secret, SettingsError


class StoreSettings(LogSettings, frozen=True, kw_only=True):
    """Where checkpoints are: a bucket beside the platform's own `s3_bucket`, `<s3_bucket>-audit` unless named.

    The keys should reach that bucket alone; where none are given, those of the platform's bucket are taken.
    """

    s3_url: str = ""
    s3_bucket: str = "fedota"
    s3_region: str = "us-east-1"
    s3_access_key: Secret | None = None
    s3_secret_key: Secret | None = None
    s3_audit_bucket: str = ""
    s3_audit_access_key: Secret | None = None
    s3_audit_secret_key: Secret | None = None

    @property
    def place(self) -> Place:
        """The bucket and its keys. Raises `SettingsError` when they are not all there."""
        access_key = self.s3_audit_access_key or self.s3_access_key
        secret_key = self.s3_audit_secret_key or self.s3_secret_key
        if not self.s3_url or access_key is None or secret_key is None:
            raise SettingsError(
                "Where the checkpoints are is not known. Set FEDOTA_S3_URL, FEDOTA_S3_AUDIT_ACCESS_KEY and "
                "FEDOTA_S3_AUDIT_SECRET_KEY."
            )
        bucket = self.s3_audit_bucket or audit_bucket(self.s3_bucket)
        return Place(self.s3_url, bucket, access_key, secret_key, self.s3_region)


class NotarySettings(StoreSettings, frozen=True, kw_only=True):
    """`key_file` (mode 0600) holds the private key, PEM and Ed25519, that checkpoints are signed with.

    A checkpoint is made every `every_seconds` in which the log has grown.
    """

    key_file: Path
    every_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0


class AuditorSettings(StoreSettings, frozen=True, kw_only=True):
    """`public_key_file` holds the notary's public key (PEM), where nobody brings it along."""

    public_key_file: Path | None = None


def audit_bucket(bucket: str) -> str:
    """The name of the bucket for checkpoints beside the platform's own."""
    return f"{bucket}-audit"


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The notary's key. Raises `SettingsError` when the file holds none, or when others may read it."""
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"Others may read the notary's key file {path}. Run: chmod 600 {path}")
        key = checkpoints.private_key(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"The notary's key file {path} cannot be read: {error.strerror}. Set key_file.") from None
    if key is None:
        raise SettingsError(
            f"The notary's key file {path} holds no private Ed25519 key. Make one: openssl genpkey -algorithm ed25519"
        )
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The notary's public key. Raises `SettingsError` when the file holds none."""
    try:
        key = checkpoints.public_key(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"The public key file {path} cannot be read: {error.strerror}.") from None
    if key is None:
        raise SettingsError(f"The file {path} holds no public Ed25519 key in PEM.")
    return key
