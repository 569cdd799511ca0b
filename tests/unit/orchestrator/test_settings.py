"""What the orchestrator accepts to be told."""

from pathlib import Path
from typing import Final

import pytest

from fedota.kernel.settings import SettingsError, load
from services.orchestrator.launchers import Exposure
from services.orchestrator.settings import Settings

_BASE: Final = {
    "FEDOTA_DATABASE_URL": "postgresql://made-up",
    "FEDOTA_NATS_URL": "nats://made-up",
    "FEDOTA_TOKEN_PUBLIC_KEY_FILE": "/k.pem",
    "FEDOTA_DIRECTORY": "/d",
}
_OPERATOR: Final = {
    "FEDOTA_OPERATOR_SEED_FILE": "/seed",
    "FEDOTA_SYSTEM_CREDENTIALS": "/system.creds",
    "FEDOTA_PLATFORM_ACCOUNT": "A",
}
_SHARED: Final = {"FEDOTA_RUNTIME_CREDENTIALS": "/shared.creds"}


@pytest.mark.parametrize("way", [_OPERATOR, _SHARED])
def test_one_of_the_two_ways_into_nats_is_enough(way: dict[str, str]) -> None:
    """And namespaces live in the process's own directory unless another is given."""
    assert load(Settings, _BASE | way).namespaces_directory == Path("/d/namespaces")
    elsewhere = load(Settings, _BASE | way | {"FEDOTA_RUNTIME_DIRECTORY": "/r"})
    assert elsewhere.namespaces_directory == Path("/r")


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_a_farewell_is_a_number_of_seconds(seconds: str) -> None:
    """One that never ends would leave what is over running for ever."""
    assert load(Settings, _BASE | _SHARED | {"FEDOTA_FAREWELL": "0"}).farewell == 0
    with pytest.raises(SettingsError, match="farewell"):
        load(Settings, _BASE | _SHARED | {"FEDOTA_FAREWELL": seconds})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (_BASE, "runtime_credentials stands in their place"),
        (_BASE | _OPERATOR | _SHARED, "belong together, without runtime_credentials"),
        (_BASE | dict(list(_OPERATOR.items())[:2]), "belong together"),
        (_BASE | _SHARED | dict(list(_OPERATOR.items())[2:]), "belong together"),
        ({k: v for k, v in (_BASE | _SHARED).items() if k != "FEDOTA_DIRECTORY"}, "runtime_directory says where"),
    ],
)
def test_what_cannot_work_is_refused_in_words(environment: dict[str, str], words: str) -> None:
    """At the start, and not at the first launch."""
    with pytest.raises(SettingsError, match=words):
        load(Settings, environment)


@pytest.mark.parametrize(
    ("told", "exposure"),
    [
        ({}, Exposure("127.0.0.1", "127.0.0.1", False)),
        ({"TLS": "true"}, Exposure("127.0.0.1", "127.0.0.1", True)),
        ({"HOST": "localhost"}, Exposure("127.0.0.1", "localhost", False)),
        ({"HOST": "10.0.0.1"}, Exposure("10.0.0.1", "10.0.0.1", True)),
        ({"HOST": "fd00::7"}, Exposure("fd00::7", "fd00::7", True)),
        ({"HOST": "fl.hospital.test"}, Exposure("0.0.0.0", "fl.hospital.test", True)),
        ({"HOST": "203.0.113.9", "BIND": "10.0.0.1"}, Exposure("10.0.0.1", "203.0.113.9", True)),
        ({"BIND": "0.0.0.0"}, Exposure("0.0.0.0", "127.0.0.1", True)),
        (
            {"HOST": "fl.hospital.test", "BIND": "127.0.0.1", "TLS": "0"},
            Exposure("127.0.0.1", "fl.hospital.test", True),
        ),
    ],
)
def test_selectors_speak_plain_http_on_loopback_only(told: dict[str, str], exposure: Exposure) -> None:
    """Whoever can be reached from elsewhere, or through something that listens there, speaks TLS."""
    environment = {f"FEDOTA_SELECTORS_{name}": value for name, value in told.items()}
    assert load(Settings, _BASE | _SHARED | environment).exposure == exposure


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"HOST": "http://a.test"}, "that clients connect to, but it is 'http://a.test'"),
        ({"HOST": "a.test:80"}, "selectors_host is the name or address"),
        ({"HOST": ""}, "selectors_host is the name or address"),
        ({"HOST": "a" * 64}, "selectors_host is the name or address"),
        ({"HOST": "0.0.0.0"}, "selectors_host is the name or address"),
        ({"HOST": "::"}, "selectors_host is the name or address"),
        ({"BIND": "a.test"}, "selectors_bind is an address of this machine, but it is 'a.test'"),
    ],
)
def test_where_nobody_can_listen_is_refused(told: dict[str, str], words: str) -> None:
    """At the start, and not by each client."""
    environment = {f"FEDOTA_SELECTORS_{name}": value for name, value in told.items()}
    with pytest.raises(SettingsError, match=words):
        load(Settings, _BASE | _SHARED | environment)
