"""`fedota audit` as an auditor runs it: from a log anywhere, with the bucket or with copies, as one file for others."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from fedota.audit.store import file_name
from fedota.cli import main
from fedota.kernel.files import private_directory, write_private
from tests.integration.audit.conftest import SCRIPT, World


class Outcome(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


async def audit(*argv: str, **environment: str) -> Outcome:
    """`fedota audit …`, with nothing of our own settings."""
    ours = {name: None for name in os.environ if name.startswith("FEDOTA_")}
    invoke = partial(CliRunner().invoke, main, ["audit", *argv], env={**ours, **environment})
    result = await asyncio.to_thread(invoke)
    return Outcome(result.exit_code, result.stdout, result.stderr)


async def script(*argv: str) -> Outcome:
    """The script, which needs nothing of Fedota, in a process of its own."""
    options = ("-I", str(SCRIPT), *argv)
    process = await asyncio.create_subprocess_exec(sys.executable, *options, stdout=PIPE, stderr=PIPE)
    output, errors = await process.communicate()
    return Outcome(process.returncode or 0, output.decode(), errors.decode())


def elsewhere(world: World) -> dict[str, str]:
    """Where log and checkpoints are, as an auditor is told."""
    access = world.ground.servers.s3_audit["auditor"]
    return {
        "FEDOTA_DATABASE_URL": world.ground.role_url("auditor").reveal(),
        "FEDOTA_S3_URL": access.url,
        "FEDOTA_S3_AUDIT_ACCESS_KEY": access.access_key,
        "FEDOTA_S3_AUDIT_SECRET_KEY": access.secret_key,
    }


async def test_a_log_is_verified_exported_and_verified_again(told: World, tmp_path: Path) -> None:
    """The whole way of an auditor; the last step needs nothing of Fedota."""
    key, file = ["--public-key", str(told.public_key_file)], tmp_path / "export.ndjson"
    fits = await audit("verify", *key, **elsewhere(told))
    assert (fits.returncode, fits.stderr) == (0, ""), fits
    assert "All fits (events: 30, checkpoints: 4); checkpoint 4 covers it up to position 25." in fits.stdout
    assert "Not covered by a checkpoint yet: 5, from position 26 on." in fits.stdout
    exported = await audit("export", "--output", str(file), *key, **elsewhere(told))
    assert exported.returncode == 0, exported
    assert file.stat().st_mode & 0o777 == 0o600
    found = await script(str(file), *key)
    assert (found.returncode, found.stderr) == (0, ""), found
    assert "All fits: 30 events, 4 checkpoints" in found.stdout
    file.write_bytes(file.read_bytes().replace(b'"actor":"\xc3\xa4', b'"actor":"x', 1))
    found = await script(str(file), *key)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("DOES NOT FIT (edited): position 1 ")


async def test_an_export_may_end_earlier(told: World) -> None:
    """Checkpoints that saw more say nothing about it, and are left out."""
    text = (await told.export(until=15)).read_text().splitlines()
    assert (len(text), '"last":15' in text[0]) == (1 + 15 + 2, True)
    key = ["--public-key", str(told.public_key_file)]
    found = await script(str(told.directory / "export.ndjson"), *key)
    assert found.returncode == 0 and "All fits: 15 events, 2 checkpoints" in found.stdout, found
    (told.directory / "export.ndjson").write_text("\n".join([*text[:15], *text[16:]]) + "\n")
    found = await script(str(told.directory / "export.ndjson"), *key)
    assert found.returncode == 1 and "(truncated): position 15 is missing" in found.stderr, found
    (told.directory / "export.ndjson").write_text(text[0] + "\n" + text[1][:50])
    found = await script(str(told.directory / "export.ndjson"), *key)
    assert found.returncode == 1 and "(format)" in found.stderr and "Traceback" not in found.stderr, found


async def test_an_export_replaces_nothing_that_it_was_not_told_to(told: World, tmp_path: Path) -> None:
    """A file stays as it is without --force; a pipe is written to; what cannot be written to is told as that."""
    file, pipe = tmp_path / "export.ndjson", tmp_path / "pipe"

    async def export(output: Path, *more: str) -> Outcome:
        key = ("--public-key", str(told.public_key_file))
        return await audit("export", "--output", str(output), *key, *more, **elsewhere(told))

    file.write_text("kept")
    found = await export(file)
    assert (found.returncode, file.read_text()) == (1, "kept")
    assert "is there already" in found.stderr
    assert (await export(file, "--force")).returncode == 0
    os.mkfifo(pipe)
    reading = asyncio.create_task(asyncio.to_thread(pipe.read_bytes))
    found = await export(pipe)
    assert (found.returncode, found.stdout, pipe.is_fifo()) == (0, "", True), found
    assert await reading == file.read_bytes()
    for output, words in ((Path("/dev/full"), "No space left"), (tmp_path / "none" / "x", "No such file")):
        found = await export(output)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr.startswith(f"Error: The export cannot be written to {output}: {words}"), found
    assert Path("/dev/full").is_char_device()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["export.ndjson", "pipe"]


async def test_a_data_directory_on_the_command_line_wins(told: World, tmp_path: Path) -> None:
    """With all that belongs to it: nothing of a platform that the environment names is mixed in, nor the other way."""
    directory = private_directory(tmp_path / "fedota" / "processes" / "auditor")
    access = told.ground.servers.s3_audit["auditor"]
    given = {
        "database_url": told.ground.role_url("auditor").reveal(),
        "s3_url": access.url,
        "s3_audit_access_key": access.access_key,
        "s3_audit_secret_key": access.secret_key,
        "public_key_file": str(told.public_key_file),
    }
    write_private(directory / "settings.json", json.dumps(given).encode())
    shut = {
        "FEDOTA_DATABASE_URL": "postgresql://a:b@127.0.0.1:1/x",
        "FEDOTA_S3_URL": "http://127.0.0.1:1",
        "XDG_DATA_HOME": str(tmp_path),
    }
    here = await audit("verify", "--data-dir", str(tmp_path / "fedota"), **shut)
    assert (here.returncode, "All fits (events: 30" in here.stdout) == (0, True), here
    environment = {**shut, "FEDOTA_DATABASE_URL": given["database_url"]}
    there = await audit("verify", "--public-key", str(told.public_key_file), **environment)
    assert there.returncode == 1 and "Where the checkpoints are is not known" in there.stderr, there
    empty = await audit("verify", **{**shut, "FEDOTA_DATABASE_URL": ""})
    assert (empty.returncode, "All fits (events: 30" in empty.stdout) == (0, True), empty


async def test_the_script_says_which_file_is_missing(told: World, tmp_path: Path) -> None:
    """The export or the key; nothing is called wrong that was not seen."""
    file, none = await told.export(), str(tmp_path / "none")
    for argv in ((none,), (str(file), "--public-key", none)):
        found = await script(*argv)
        assert found.returncode == 1
        assert found.stderr == f"Nothing was verified: {none} cannot be read (No such file or directory).\n"


async def test_copies_of_checkpoints_do_as_well(world: World, tmp_path: Path) -> None:
    """An auditor keeps them where nobody of the platform reaches them; what is wrong is said with its position."""
    await world.story()
    copies = tmp_path / "copies" / "checkpoints"
    copies.mkdir(parents=True)
    for number in world.numbers():
        (copies / file_name(number)).write_bytes(world.checkpoint(number))
        world.remove(number)
    options = ["--public-key", str(world.public_key_file), "--checkpoints", str(copies.parent)]
    url = {"FEDOTA_DATABASE_URL": world.ground.role_url("auditor").reveal()}
    fits = await audit("verify", *options, **url)
    assert (fits.returncode, "checkpoints: 4" in fits.stdout) == (0, True), fits
    async with world.ground.superuser() as connection:
        await connection.execute("alter table fedota.events disable trigger append_only")
        await connection.execute("delete from fedota.events where position = 17")
    found = await audit("verify", *options, **url)
    assert found.returncode == 1, found
    assert "DOES NOT FIT at position 17 (deleted): event 17 is missing: a deletion." in found.stdout
    assert "Up to position 16 the chain fits; checkpoint 2 covers it up to position 10." in found.stdout


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("FEDOTA_DATABASE_URL", "There is no platform in"),
        ("FEDOTA_S3_URL", "Where the checkpoints are is not known"),
        ("--public-key", "The notary's public key is not known"),
    ],
)
async def test_what_is_missing_is_said_in_words(told: World, tmp_path: Path, missing: str, words: str) -> None:
    """One sentence, exit status 1."""
    environment = {name: value for name, value in elsewhere(told).items() if name != missing}
    options = [] if missing == "--public-key" else ["--public-key", str(told.public_key_file)]
    found = await audit("verify", *options, **environment, XDG_DATA_HOME=str(tmp_path))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("Error: ") and words in found.stderr and found.stderr.count("\n") == 1


async def test_what_does_not_answer_is_said_in_words(told: World) -> None:
    """A wrong password, a shut port, a database without a log, a wrong key to the store."""
    url, key = told.ground.role_url("auditor").reveal(), ["--public-key", str(told.public_key_file)]
    for change, words in {
        "FEDOTA_DATABASE_URL": (url.replace("made-up", "wrong"), "does not let the auditor read the log"),
        "FEDOTA_DATABASE_URL ": ("postgresql://a:b@127.0.0.1:1/x", "The database does not answer"),
        "FEDOTA_DATABASE_URL   ": (f"{url}s", "The database refuses to be read: database"),
        "FEDOTA_DATABASE_URL    ": ("postgresql://a:b@127.0.0.1:99999/x", "is not a valid address: Port out of range"),
        "FEDOTA_DATABASE_URL     ": ("nonsense", "address is not valid"),
        "FEDOTA_DATABASE_URL  ": (told.ground.servers.admin_url, "holds no event log"),
        "FEDOTA_S3_AUDIT_SECRET_KEY": ("wrong", "The object store refused what we asked of fedota-audit"),
    }.items():
        given = {**elsewhere(told), change.strip(): words[0]}
        found = await audit("verify", *key, **given)
        assert (found.returncode, found.stdout) == (1, ""), found
        assert found.stderr.startswith("Error: ") and words[1] in found.stderr, found
        assert "Traceback" not in found.stderr
