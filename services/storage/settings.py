"""What storage is told."""

from fedota.kernel.settings import ProcessSettings, Secret


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """The object store, and how long things in it may wait.

    `s3_public_url` is what people and coordinators reach the store by, where that is not `s3_url`; a proxy in between
    must pass the Host header on, because it is signed. A link that was signed is good for `link_seconds`. Every
    `sweep_seconds`, uploads that nobody claimed for `unclaimed_seconds` are removed.
    """

    s3_url: str
    s3_access_key: Secret
    s3_secret_key: Secret
    s3_bucket: str = "fedota"
    s3_region: str = "us-east-1"
    s3_public_url: str = ""
    link_seconds: int = 900
    unclaimed_seconds: float = 86_400.0
    sweep_seconds: float = 3_600.0
