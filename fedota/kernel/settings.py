"""Settings: one frozen struct a process, read once from a file and the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


class Secret:
    """A value that never shows itself in a log, a traceback or a repr; `.reveal()` is the only way to it."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('…')"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret does not leave its process: pickle would write it out")


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told that needs the log alone. `port` 0 means any free one.

    `directory` is the process's own: it writes `ready.json` there.
    """

    database_url: Secret
    directory: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    log_level: str = "info"


class ProcessSettings(LogSettings, frozen=True, kw_only=True):
    """What every other process of the platform is told. `nats_credentials` is the path of its `.creds` file."""

    nats_url: str
    nats_credentials: Path | None = None


class SettingsError(Exception):
    """A setting is missing or wrong; the message names it and says how to give it."""


def load(kind: type[S], environment: Mapping[str, str] = os.environ) -> S:
    """The settings of a process: the JSON file that `FEDOTA_SETTINGS` names, and over it `FEDOTA_<NAME>` variables."""
    values = _file(Path(path)) if (path := environment.get("FEDOTA_SETTINGS")) else {}
    for field in msgspec.structs.fields(kind):
        if (value := environment.get(f"FEDOTA_{field.name.upper()}")) is not None:
            values[field.name] = value
    try:
        return msgspec.convert(values, kind, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"{kind.__module__}: {error}. Set it as FEDOTA_<NAME> or in the file that FEDOTA_SETTINGS names."
        ) from None


def _file(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise SettingsError(f"{path}, which FEDOTA_SETTINGS names, cannot be read: {error.strerror}.") from None
    except msgspec.DecodeError as error:  # its text is a place in the file, never a value
        raise SettingsError(f"{path}, which FEDOTA_SETTINGS names, is not a JSON object: {error}.") from None


def _decode(kind: type, value: Any) -> Any:
    if kind not in (Secret, Path):
        raise NotImplementedError(kind)
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)
