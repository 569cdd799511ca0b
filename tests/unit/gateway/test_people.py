"""Names of people before there is a database: who may be named in a token, and the file that keys are wrapped under."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.exceptions import InvalidTag

from fedota.kernel.settings import Secret, SettingsError
from gateway.app import create_app
from gateway.auth import Identity, Tokens, read_tokens
from gateway.people import PeopleKeys, _open, _seal, read_key_file
from gateway.settings import Settings


def tokens(path: Path, **more: Any) -> Path:
    """A tokens file with one token."""
    path.write_bytes(msgspec.json.encode([{"role": "setter", "sha256": hashlib.sha256(b"t").hexdigest(), **more}]))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("name", ["anna", "anna@clinic.example", "Änna O'Neil", "a~b", "x" * 200, "東京"])
def test_a_token_may_name_a_person(tmp_path: Path, name: str) -> None:
    """Whoever comes with it is that person, in the token's role."""
    known = read_tokens(tokens(tmp_path / "tokens", person=name))
    assert known.people == {name}
    assert known.identify("t") == Identity(role="setter", person=name)
    assert not Tokens([]).people and not read_tokens(tokens(tmp_path / "tokens")).people


@pytest.mark.parametrize("name", ["", " anna", "anna ", "a\nb", "a\0", "anna\n", "x" * 201, "0123456789abcdef" * 2])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """What nobody can see or type, what is too long, and what would be taken for an id."""
    with pytest.raises(SettingsError, match="person"):
        read_tokens(tokens(tmp_path / "tokens", person=name))


def test_the_key_file(tmp_path: Path) -> None:
    """It is needed as soon as a token names a person, and is the gateway's alone; each fault says what to do."""
    path = tmp_path / "people.key"
    assert read_key_file(None, needed=False) is None
    with pytest.raises(SettingsError, match="set people_key_file"):
        read_key_file(None, needed=True)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_key_file(path, needed=False)
    path.write_bytes(b"a" * 64)
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_key_file(path, needed=True)
    path.chmod(0o600)
    one = read_key_file(path, needed=True)
    path.write_bytes(b"a" * 64 + b"\n")
    other = read_key_file(path, needed=True)
    assert one and other and one.proof == other.proof  # an editor's line feed is none of the key
    path.write_bytes(b"a" * 31)
    with pytest.raises(SettingsError, match="openssl rand"):
        read_key_file(path, needed=True)


def test_a_gateway_does_not_start_without_it(tmp_path: Path) -> None:
    """Better than to find out when the first person acts."""
    settings = Settings(
        database_url=Secret(""), nats_url="", tokens_file=tokens(tmp_path / "tokens", person="anna@clinic.example")
    )
    with pytest.raises(SettingsError, match="people_key_file is not set") as refusal:
        create_app(settings)
    assert "anna" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a", "x" * 32, "x" * 200, "Änna O'Neil", "\N{FAMILY}" * 200])
def test_what_is_sealed_comes_back(name: str) -> None:
    """Always the same text for a person, another one for each; its length tells little of the name's."""
    keys = PeopleKeys(b"a" * 32)
    key, wrapped = keys.new("1" * 32)
    sealed = _seal(key, "1" * 32, name)
    again = keys.unwrap("1" * 32, wrapped)
    assert _seal(again, "1" * 32, name) == sealed and _open(again, "1" * 32, sealed) == name
    assert len(sealed) in {len(_seal(key, "1" * 32, "y" * length)) for length in range(32, 801, 32)}
    assert len(sealed) < 1200  # an idempotency key holds it, and has to fit into an index of PostgreSQL
    other, _ = keys.new("1" * 32)
    assert _seal(other, "1" * 32, name) != sealed
    for opener, person in ((other, "1" * 32), (key, "2" * 32)):
        with pytest.raises(InvalidTag):
            _open(opener, person, sealed)


def test_a_wrapped_key_is_of_one_person_and_one_file() -> None:
    """A row that was moved to another person, or to another platform, opens nothing."""
    keys = PeopleKeys(b"a" * 32)
    _, wrapped = keys.new("1" * 32)
    for stranger, person in ((keys, "2" * 32), (PeopleKeys(b"b" * 32), "1" * 32)):
        with pytest.raises(InvalidTag):
            stranger.unwrap(person, wrapped)
    assert keys.digest("anna") != PeopleKeys(b"b" * 32).digest("anna")
    assert keys.proof not in (keys.digest(""), PeopleKeys(b"b" * 32).proof)
