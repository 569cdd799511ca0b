"""The notary signs what fits, once for each number, whatever dies meanwhile; what does not fit it refuses."""

import asyncio
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from minio.error import S3Error

from fedota.audit.checkpoints import verified
from fedota.audit.notary import Notary, RefusedError, create_app
from fedota.audit.store import Bucket
from fedota.kernel.settings import Secret, SettingsError
from fedota.local.seaweedfs import S3Access
from tests.contract.ground import readiness
from tests.integration.audit.conftest import World, place
from tests.support.door import Door
from tests.support.objects import opened
from tests.support.servers import RunningServers
from tests.support.services import running, until


async def test_it_signs_only_what_is_new(world: World) -> None:
    """The first over an empty log; each names the one before it; one more event, one more checkpoint."""
    for count in (0, 3, 0, 1):
        await world.grow(count)
        await world.notary.sign()
        await world.another_notary().sign()  # one that has just started has nothing to add
    assert world.numbers() == [1, 2, 3]
    signed = [verified(world.checkpoint(number), world.key.public_key()) for number in (1, 2, 3)]
    assert [checkpoint.position for checkpoint in signed] == [0, 3, 4]
    report = await world.verify()
    assert (report.findings, report.covered) == ([], 4)


async def test_two_at_once_make_one_sequence(world: World) -> None:
    """While the log grows under them."""
    notaries = [world.another_notary() for _ in range(4)]

    async def signing(notary: Notary) -> None:
        for _ in range(5):
            await notary.sign()

    await asyncio.gather(world.grow(15), *map(signing, notaries))
    await world.notary.sign()
    numbers = world.numbers()
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 1
    report = await world.verify()
    assert (report.findings, report.covered, report.checkpoints) == ([], 15, len(numbers))


async def refusal(notary: Notary) -> str:
    """Why it does not sign."""
    with pytest.raises(RefusedError) as caught:
        await notary.sign()
    return str(caught.value)


async def test_it_refuses_what_does_not_fit(told: World) -> None:
    """Whether it has run all the time or has just started; and says which position."""
    for change, words in {
        "update fedota.events set actor = 'nobody' where position = 28": "does not fit at position 28",
        "delete from fedota.events where position = 27": "does not fit at position 27",
        "update fedota.head set hash = sha256(hash)": "does not fit at position 30",
        "update fedota.events set hash = sha256(hash) where position = 25": "up to position 25 were changed",
        "delete from fedota.events where position > 24": "event at position 25 is not",
        "delete from fedota.events where position > 28": "does not fit at position 29",
        "update fedota.events set position = 0 where position = 3": "there is an event at position 0",
        "update fedota.head set position = 20": "from position 21 on the tail was cut off",
    }.items():
        async with told.tampered() as connection:
            await connection.execute(change)
            assert words in await refusal(told.another_notary())
        assert told.numbers() == [1, 2, 3, 4]


async def test_a_rewritten_chain_is_refused_though_it_fits_in_itself(told: World) -> None:
    """Also where nothing was appended since."""
    async with told.tampered() as connection:
        await connection.execute("update fedota.events set actor = 'nobody' where position = 12")
        await connection.chain_anew(12)
        assert "up to position 25 were changed" in await refusal(told.another_notary())
        await connection.execute("delete from fedota.events where position > 25")
        await connection.chain_anew(12)
        assert "up to position 25 were changed" in await refusal(told.another_notary())


async def test_it_refuses_a_store_that_was_changed(world: World) -> None:
    """Checkpoints that it has seen must be there: in memory, and in its file after a restart."""
    memory = world.directory / "newest.txt"
    notary = world.another_notary(memory=memory)
    await world.grow(1)
    await notary.sign()
    await world.grow(1)
    await notary.sign()
    assert memory.stat().st_mode & 0o777 == 0o600
    kept = world.checkpoint(2)
    for other in (b"", world.checkpoint(1)):
        world.remove(2)
        if other:
            world.plant(2, other)
        assert "Checkpoint 2 at position 2 is not in the object store" in await refusal(notary)
        again = world.another_notary(memory=memory)
        with pytest.raises(RefusedError, match="Checkpoint 2 at position 2 is not in the object store"):
            await again._prepare()
            await again.sign()
        world.plant(2, kept)
    world.plant(3, kept)
    assert "Checkpoint 3 in the object store is out of sequence" in await refusal(notary)
    world.plant(3, b"nonsense")
    assert "Checkpoint 3 in the object store is not in the form" in await refusal(notary)
    world.plant(3, b"")
    assert "Checkpoint 3 in the object store is not in the form" in await refusal(notary)
    world.remove(3)
    await notary.sign()
    assert world.numbers() == [1, 2]


async def test_a_memory_that_was_lost_with_the_power_is_none(world: World) -> None:
    """An empty file says nothing; the store does, and what it says is kept again."""
    memory = world.directory / "newest.txt"
    await world.grow(1)
    await world.notary.sign()
    memory.touch()
    notary = world.another_notary(memory=memory)
    await notary._prepare()
    await world.grow(1)
    await notary.sign()
    assert memory.read_bytes() == world.checkpoint(2)
    assert (await world.verify()).findings == []


async def failing(url: str) -> dict[str, str]:
    """What is not ready, and why."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/readyz") as reply:
        found: dict[str, str] = (await reply.json())["failing"]
        return found


async def test_it_is_not_ready_while_it_refuses_and_goes_on_when_that_is_mended(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so in its log once, in its readiness all the time."""
    await world.grow(3)
    async with running(create_app, world.settings()) as service:

        async def signed() -> bool:
            return len(world.numbers()) == 1

        await until(signed, "the first checkpoint is there")
        assert await failing(service.url) == {}
        async with world.ground.superuser() as connection:
            await connection.execute("update fedota.head set position = 1")

            async def refuses() -> str:
                return (await failing(service.url)).get("chain", "")

            assert "from position 2 on the tail was cut off" in await until(refuses, "it refuses")
            async with aiohttp.ClientSession() as http, http.get(f"{service.url}/metrics") as reply:
                text = await reply.text()
            assert "fedota_notary_refuses 1.0" in text and "fedota_notary_position 3.0" in text
            await connection.execute("update fedota.head set position = 3")

        async def ready() -> bool:
            return await failing(service.url) == {}

        await until(ready, "it goes on")
        await world.grow(1)

        async def two() -> bool:
            return len(world.numbers()) == 2

        await until(two, "it signs again")
    assert capsys.readouterr().out.count("no checkpoint is signed") == 1


async def test_it_is_not_ready_while_it_cannot_write(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that only read, as the auditor's: everything answers, and yet nothing is signed."""
    monkeypatch.setattr("fedota.audit.notary._PAUSE", 0.05)
    access = world.ground.servers.s3_audit["auditor"]
    keys = {"s3_audit_access_key": Secret(access.access_key), "s3_audit_secret_key": Secret(access.secret_key)}
    async with running(create_app, world.settings(**keys)) as service:

        async def fails() -> str:
            return (await failing(service.url)).get("chain", "")

        words = await until(fails, "it says that it cannot sign")
        assert "No checkpoint could be signed since 20" in words and "took no checkpoint (HTTP status 403)" in words
        async with aiohttp.ClientSession() as http, http.get(f"{service.url}/metrics") as reply:
            assert "fedota_notary_failures 0.0" not in await reply.text()
    assert world.numbers() == []


async def test_outages_are_waited_out(world: World) -> None:
    """Of the object store at the start, of either later."""
    access = world.ground.servers.s3_audit["notary"]
    database = world.ground.role_url("notary").reveal()
    place_ = database.rpartition("@")[2].partition("/")[0]
    async with Door.to(access.url) as store, Door.to(f"tcp://{place_}") as postgres:
        await postgres.open()
        url = Secret(database.replace(place_, postgres.url.removeprefix("http://")))
        async with running(create_app, world.settings(s3_url=store.url, database_url=url)) as service:

            async def count(number: int) -> None:
                async def there() -> bool:
                    return len(world.numbers()) == number and not await failing(service.url)

                await until(there, f"checkpoint {number} is there")

            async def fails(*names: str) -> None:
                async def so() -> bool:
                    return set(names) <= set(await failing(service.url))

                await until(so, f"{names} fail")

            await fails("s3")
            await store.open()
            await count(1)
            for door, name in ((store, "s3"), (postgres, "log")):
                number = len(world.numbers())
                await door.shut()
                await fails(name)
                await world.grow(1)
                await door.open()
                await count(number + 1)


@asynccontextmanager
async def process(world: World, directory: Path) -> AsyncIterator[Process]:
    """The notary as a process of its own; killed in the end."""
    directory.mkdir(exist_ok=True)
    settings = world.settings(directory=directory, every_seconds=0.01)
    file = directory / "settings.json"
    file.write_bytes(msgspec.json.encode(settings, enc_hook=_told))
    with (directory / "log").open("ab") as log:
        environment = {**os.environ, "FEDOTA_SETTINGS": str(file)}
        argv = (sys.executable, "-m", "fedota.audit.notary")
        child = await asyncio.create_subprocess_exec(*argv, env=environment, stderr=log)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def _told(value: Any) -> str:
    return value.reveal() if isinstance(value, Secret) else str(value)


async def test_two_that_are_killed_again_and_again_leave_one_sequence(world: World) -> None:
    """With -9, in the middle of whatever they do, while events are appended."""
    over = asyncio.Event()

    async def grow() -> None:
        while not over.is_set():
            await world.grow(3)

    growing = asyncio.create_task(grow())
    try:
        for turn in range(3):
            before = len(world.numbers())
            async with process(world, world.directory / "one"), process(world, world.directory / "two"):

                async def more(before: int = before, turn: int = turn) -> bool:
                    return len(world.numbers()) > before + turn

                await until(more, "checkpoints are made", 60)
    finally:
        over.set()
        await growing
    assert (await world.verify()).findings == []
    await world.another_notary().sign()
    report = await world.verify()
    assert (report.findings, report.covered, report.checkpoints) == ([], report.head, len(world.numbers()))


async def test_the_process_is_ready_and_has_covered_all(world: World) -> None:
    """As the platform starts it."""
    await world.grow(3)
    async with process(world, world.directory / "one"):
        assert (await readiness(world.directory / "one"))["code"] == 200

        async def covered() -> bool:
            return world.numbers() != [] and (await world.verify()).covered == 3

        await until(covered, "all of it is covered")


async def test_a_key_that_others_may_read_is_not_used(world: World) -> None:
    """Nor one that is none, nor a store without keys."""
    world.key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="Others may read"):
        create_app(world.settings())
    world.key_file.write_bytes(b"nonsense")
    world.key_file.chmod(0o600)
    with pytest.raises(SettingsError, match="no private Ed25519 key"):
        create_app(world.settings())
    with pytest.raises(SettingsError, match="cannot be read"):
        create_app(world.settings(key_file=world.directory / "none"))


def may(access: S3Access, bucket: str, what: str) -> bool:
    """Whether an identity may do that with a bucket."""
    with opened(access) as store:
        try:
            match what:
                case "list":
                    list(store.list_objects(bucket))
                case "read":
                    store.stat_object(bucket, "checkpoints/kept")
                case "write":
                    store.fput_object(bucket, "checkpoints/planted", __file__)
                case "delete":
                    store.remove_object(bucket, "checkpoints/planted")
                case "make":
                    store.make_bucket(bucket)
        except S3Error as error:
            if error.code == "AccessDenied":
                return False
            assert error.code in ("NoSuchKey", "NoSuchBucket", "BucketAlreadyExists", "BucketAlreadyOwnedByYou"), error
        return True


async def test_each_identity_reaches_its_own_bucket(world: World, servers: RunningServers) -> None:
    """Who takes storage's keys reaches no checkpoint; who takes the notary's no file; an auditor only reads."""
    everything = ["list", "read", "write", "delete", "make"]
    audit, own = world.bucket_name, servers.s3.bucket
    allowed = {
        (servers.s3, own): everything,
        (servers.s3, audit): [],
        (servers.s3_audit["notary"], audit): everything,
        (servers.s3_audit["notary"], own): [],
        (servers.s3_audit["auditor"], audit): ["list", "read"],
        (servers.s3_audit["auditor"], own): [],
    }
    for (access, bucket), actions in allowed.items():
        assert [what for what in everything if may(access, bucket, what)] == actions, (access.access_key, bucket)
    assert not any(may(access, "another", "make") for access, _ in allowed)


async def test_many_checkpoints_are_read_in_order(world: World) -> None:
    """More than are fetched at once; the newest is found from any of them on."""
    world.notary = world.another_notary()
    for _ in range(40):
        await world.grow(1)
        await world.notary.sign()
    assert [file.number async for file in world.bucket.files(39)] == list(range(1, 40))
    assert [await world.bucket.newest(after=number) for number in (0, 35, 40, 99)] == [40, 40, 40, 99]
    report = await world.verify()
    assert (report.findings, report.checkpoints, report.covered) == ([], 40, 40)


async def test_a_number_is_given_once(world: World) -> None:
    """Whoever comes second is told so, whatever they bring."""
    with Bucket.open(place(world.ground.servers.s3_audit["notary"])) as other:
        one, two = await asyncio.gather(world.bucket.add(1, b"one"), other.add(1, b"two"))
    assert one != two
    assert world.checkpoint(1) == (b"one" if one else b"two")
    assert await world.bucket.add(1, b"one") == one  # a first try whose answer was lost has written it
