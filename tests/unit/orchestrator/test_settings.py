"""What the orchestrator accepts to be told."""

from pathlib import Path
from typing import Final

import pytest

from fedota.kernel.settings import SettingsError, load
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
