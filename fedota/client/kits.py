"""The join kit, read from its file."""

import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from fedota.client.errors import ClientError
from fedota.contracts.kit import Kit
from fedota.tls import is_loopback


def read_kit(path: Path) -> Kit:
    """The kit in a file. Raises `ClientError` when it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kit)
    except OSError as error:
        raise ClientError(f"The join kit {path} cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClientError(f"{path} is not a join kit ({error}). Download it again from the problem's page.") from None


def page_of(kit: Kit) -> str:
    """What to call the problem's page, with its address where the kit has it."""
    return f"the problem's page ({kit.page})" if kit.page else "the problem's page"


def require_usable(kit: Kit) -> None:
    """Raise `ClientError` when nothing can be done with the kit."""
    if kit.expires <= time.time():
        raise ClientError(f"The join kit has expired. Download a new one from {page_of(kit)}.")
    if not kit.selectors:
        raise ClientError("The join kit names no selector. Download it again once the training has started.")
    for url in kit.selectors:
        _require_private(url)


def _require_private(url: str) -> None:
    """Raise unless what is sent there, the token first of all, can be read by nobody on the way."""
    try:
        parts = urlsplit(url)
        is_private = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    except ValueError:
        is_private = False
    if not is_private:
        raise ClientError(
            f"The join kit names the selector {url}, which is not an https:// address. Nothing is sent in plain text "
            "to another machine. Download the join kit again."
        )
