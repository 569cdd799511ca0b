"""What the gateway is told."""

from pathlib import Path

from fedota.kernel.settings import ProcessSettings


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """`tokens_file` (mode 0600) lists who may come in, see `gateway.auth.read_tokens`.

    `people_key_file` (mode 0600) is needed where a token there names a person: the keys of names are wrapped under it,
    see `gateway.people`.
    `https` says that people reach the gateway by HTTPS: the session cookie is then sent over nothing else.
    `s3_public_url` is where the object store's presigned links lead: pages may send files there, and where it is not
    given they leave uploads to scripts.
    `heartbeat` is the number of seconds between signs of life on a quiet event stream.
    """

    tokens_file: Path
    people_key_file: Path | None = None
    https: bool = False
    heartbeat: float = 15.0
    s3_public_url: str = ""
