"""The keys of a local platform outlive whatever happens to their files, and what went wrong is said in words."""

import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedota.local.platform import _key_pair, _people_key
from fedota.local.programs import Program, kept_alive
from fedota.local.state import DataDirectory, LocalError, held

NAMES = ("token", "notary")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory that was held before."""
    with held(tmp_path / "data"):
        return tmp_path / "data"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_key_that_was_lost_is_made_from_its_key(directory: Path, name: str) -> None:
    """The key stays what it is: what it has signed is still good."""
    private_file, public_file = _key_pair(DataDirectory(directory), name)
    private, public = private_file.read_bytes(), public_file.read_bytes()
    key = load_pem_private_key(private, None).public_key()
    assert key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == public
    public_file.unlink()
    assert _key_pair(DataDirectory(directory), name) == (private_file, public_file)
    assert (private_file.read_bytes(), public_file.read_bytes()) == (private, public)
    assert public_file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_was_lost_is_not_replaced(directory: Path, name: str) -> None:
    """The public one says that there was one; a damaged one is no key either."""
    private_file, public_file = _key_pair(DataDirectory(directory), name)
    public = public_file.read_bytes()
    private_file.unlink()
    with pytest.raises(LocalError, match=f"{name}.pem is gone. Restore it"):
        _key_pair(DataDirectory(directory), name)
    assert public_file.read_bytes() == public and not private_file.exists()
    private_file.write_bytes(b"no key")
    public_file.unlink()
    with pytest.raises(LocalError, match="is damaged"):
        _key_pair(DataDirectory(directory), name)


def test_the_key_of_people_is_made_once(directory: Path) -> None:
    """For a new platform, or one from before there were people; never in the place of one that was lost."""
    file = _people_key(DataDirectory(directory))
    key = file.read_bytes()
    assert _people_key(DataDirectory(directory)).read_bytes() == key
    file.unlink()
    for _ in range(2):
        with pytest.raises(LocalError, match=r"people\.key is gone. Restore it"):
            _people_key(DataDirectory(directory))
    assert not file.exists()
    file.write_bytes(key)
    assert _people_key(DataDirectory(directory)) == file


def test_a_key_of_people_from_before_it_was_noted_is_noted(directory: Path) -> None:
    """As one that an earlier version has made."""
    data = DataDirectory(directory)
    (data.sub("keys") / "people.key").write_bytes(b"a" * 64)
    file = _people_key(data)
    file.unlink()
    with pytest.raises(LocalError, match="is gone"):
        _people_key(DataDirectory(directory))


async def test_why_a_process_does_not_run_is_a_sentence(tmp_path: Path) -> None:
    """Whoever starts the platform reads what to do, in the words of the process, without a traceback."""
    settings = tmp_path / "settings.json"
    told = {"database_url": "postgresql://", "nats_url": "nats://", "tokens_file": str(tmp_path / "none")}
    settings.write_bytes(msgspec.json.encode(told))

    async def ready() -> bool:
        return False

    argv = [sys.executable, "-m", "gateway"]
    program = Program("gateway", argv, tmp_path, ready, env={"FEDOTA_SETTINGS": str(settings)})
    with pytest.raises(LocalError) as failure:
        async with kept_alive(program):
            raise AssertionError("it does not run")
    first, second = str(failure.value).splitlines()
    assert first.startswith("gateway ended before it answered: The tokens file ") and "Set tokens_file." in first
    assert second == f"{tmp_path / 'log'} says more."
