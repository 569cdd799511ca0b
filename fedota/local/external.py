"""Servers that stand elsewhere, in place of embedded ones, and where others reach what runs here."""

from pathlib import Path

import msgspec

from fedota.audit.settings import audit_bucket
from fedota.kernel.settings import Secret
from fedota.local.seaweedfs import S3Access
from fedota.local.state import LocalError


class External(msgspec.Struct, frozen=True, kw_only=True):
    """Read from `FEDOTA_<NAME>` variables; what is not given is embedded.

    `database_url` is of a role that owns the database and may create roles (PostgreSQL 16 or newer, one platform a
    server). With `nats_url`, `nats_credentials` is the `.creds` file of the platform's processes and
    `nats_runtime_credentials` that of all coordinators: without operator mode problems are not isolated from each
    other on NATS. Checkpoints of the log go to `s3_audit_bucket` (`<s3_bucket>-audit`), by keys of their own where
    these are given: what storage holds should not reach them.

    Clients on other machines reach the selectors at `selectors_host`, by TLS. What is over stays up for `farewell`
    seconds. The orchestrator's settings say more of both.
    """

    database_url: Secret | None = None
    nats_url: str = ""
    nats_credentials: Path | None = None
    nats_runtime_credentials: Path | None = None
    s3_url: str = ""
    s3_access_key: str = ""
    s3_secret_key: Secret | None = None
    s3_bucket: str = "fedota"
    s3_region: str = "us-east-1"
    s3_audit_bucket: str = ""
    s3_audit_access_key: str = ""
    s3_audit_secret_key: Secret | None = None
    selectors_host: str = ""
    selectors_bind: str = ""
    selectors_tls: bool = False
    farewell: float | None = None

    def require_whole(self) -> None:
        """Raise `LocalError` when half of what belongs together is missing."""
        if self.nats_url and not (self.nats_credentials and self.nats_runtime_credentials):
            raise LocalError("FEDOTA_NATS_URL needs FEDOTA_NATS_CREDENTIALS and FEDOTA_NATS_RUNTIME_CREDENTIALS.")
        if self.s3_url and not (self.s3_access_key and self.s3_secret_key):
            raise LocalError("FEDOTA_S3_URL needs FEDOTA_S3_ACCESS_KEY and FEDOTA_S3_SECRET_KEY.")

        if bool(self.s3_audit_access_key) != bool(self.s3_audit_secret_key):
            raise LocalError("FEDOTA_S3_AUDIT_ACCESS_KEY and FEDOTA_S3_AUDIT_SECRET_KEY need each other.")

    @property
    def selectors(self) -> dict[str, str | bool | float]:
        """What the orchestrator is told of where selectors listen, and for how long; the rest is left to it."""
        told: dict[str, str | bool | float] = {
            "selectors_host": self.selectors_host,
            "selectors_bind": self.selectors_bind,
            "selectors_tls": self.selectors_tls,
        }
        given = {name: value for name, value in told.items() if value}
        return given if self.farewell is None else {**given, "farewell": self.farewell}

    @property
    def s3(self) -> S3Access | None:
        """The object store, if it stands elsewhere."""
        if not self.s3_url or self.s3_secret_key is None:
            return None
        return S3Access(self.s3_url, self.s3_access_key, self.s3_secret_key.reveal(), self.s3_bucket, self.s3_region)

    @property
    def s3_audit(self) -> dict[str, S3Access]:
        """The bucket for checkpoints there, for the notary and the auditor."""
        if (store := self.s3) is None:
            return {}
        access_key, secret_key = store.access_key, store.secret_key
        if self.s3_audit_secret_key is not None:
            access_key, secret_key = self.s3_audit_access_key, self.s3_audit_secret_key.reveal()
        bucket = self.s3_audit_bucket or audit_bucket(store.bucket)
        access = S3Access(store.url, access_key, secret_key, bucket, self.s3_region)
        return {"notary": access, "auditor": access}
