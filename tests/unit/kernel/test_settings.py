"""Settings come from a file and the environment; secrets stay where they are."""

import copy
import io
import logging
import pickle
from pathlib import Path

import msgspec
import pytest
import structlog

from fedota.kernel.settings import ProcessSettings, Secret, SettingsError, load

URL = "postgresql://user:hunter2@127.0.0.1/db"


def file(path: Path, content: bytes) -> dict[str, str]:
    """The environment that names a settings file."""
    path.write_bytes(content)
    return {"FEDOTA_SETTINGS": str(path)}


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    """What neither gives has its default; text becomes what the field is."""
    environment = file(
        tmp_path / "settings.json",
        msgspec.json.encode({"database_url": "postgresql://file", "nats_url": "nats://file", "port": 1}),
    )
    settings = load(ProcessSettings, {**environment, "FEDOTA_DATABASE_URL": URL, "FEDOTA_PORT": "8080"})
    assert settings.database_url.reveal() == URL
    assert (settings.nats_url, settings.port, settings.host) == ("nats://file", 8080, "127.0.0.1")


def test_paths_are_paths() -> None:
    """From text, wherever it stands."""
    settings = load(
        ProcessSettings,
        {"FEDOTA_DATABASE_URL": URL, "FEDOTA_NATS_URL": "nats://n", "FEDOTA_NATS_CREDENTIALS": "/etc/relay.creds"},
    )
    assert settings.nats_credentials == Path("/etc/relay.creds")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FEDOTA_NATS_URL": "nats://n"}, "database_url"),
        ({"FEDOTA_NATS_URL": "nats://n", "FEDOTA_DATABASE_URL": URL, "FEDOTA_PORT": "many"}, "port"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment: dict[str, str], named: str) -> None:
    """With the way to give it, and without any value."""
    with pytest.raises(SettingsError, match=named) as caught:
        load(ProcessSettings, environment)
    assert "FEDOTA_SETTINGS" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"database_url": "hunter2"', "not a JSON object"),
        (b'["hunter2"]', "not a JSON object"),
        (b'{"database_url": 4711, "nats_url": "nats://n"}', "database_url"),
    ],
)
def test_a_wrong_file_is_told_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    """As an error that a person can act on, not as a traceback, and without what stands in it."""
    with pytest.raises(SettingsError, match=said) as caught:
        load(ProcessSettings, file(tmp_path / "settings.json", content))
    assert "hunter2" not in str(caught.value) and "4711" not in str(caught.value)


def test_a_missing_file_is_told_by_name(tmp_path: Path) -> None:
    """The path is what the reader needs."""
    with pytest.raises(SettingsError, match=r"missing\.json.*No such file"):
        load(ProcessSettings, {"FEDOTA_SETTINGS": str(tmp_path / "missing.json")})


def test_a_secret_never_shows_itself() -> None:
    """Not by any of the ways in which a value gets into a text."""
    settings = ProcessSettings(database_url=Secret("hunter2"), nats_url="nats://n")
    secret = settings.database_url
    out = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.WriteLogger(out),
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
    )
    logger.info("said", secret=secret, settings=settings)
    record = logging.LogRecord("n", logging.INFO, "p", 1, "%s %r", (secret, secret), None)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!s:>30}", "%s" % secret, repr(settings), str([secret])]  # noqa: UP031
    shown += [out.getvalue(), record.getMessage()]
    assert all("hunter2" not in text for text in shown), shown
    assert secret.reveal() == "hunter2"


def test_a_secret_is_not_written_out() -> None:
    """Neither by pickle, on its own or within settings, nor as JSON."""
    settings = ProcessSettings(database_url=Secret("hunter2"), nats_url="nats://n")
    for value in (settings.database_url, settings):
        with pytest.raises(TypeError):
            pickle.dumps(value)
        with pytest.raises(TypeError):
            copy.deepcopy(value)
        with pytest.raises(TypeError):
            msgspec.json.encode(value)
