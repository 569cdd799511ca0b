"""What happens when something is late, down, killed or large."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedota.contracts.commands import AnnouncedFile, PrepareUpload, PresignDownload, StoreFiles
from fedota.errors import FedotaError
from fedota.events.storage import FilesDeleted, FilesStored
from fedota.kernel.database import connect_pool
from fedota.kernel.service import Service
from services.storage.app import create_app
from services.storage.blobs import Blobs
from services.storage.sweeper import Sweeper
from services.storage.turns import Turns
from tests.integration.storage.conftest import BODIES, DATA, FILES, World, announced, failures, got, key_of, put
from tests.support.services import new_id, running, until

MB = 1024**2


async def test_a_late_object_store_is_waited_for(world: World, problem_id: str) -> None:
    """Storage starts without S3, says so, makes its bucket once S3 answers, and then works."""
    await asyncio.to_thread(_remove_bucket, world)
    await world.door.shut()
    async with running(create_app, world.settings()) as service:
        assert list(await failures(service.url)) == ["s3"]
        error = await world.platform.refused(PrepareUpload(problem_id=problem_id, files=FILES))
        assert (error.problem.code, error.problem.retry_after) == ("unavailable", 2)
        assert "object store" in error.problem.detail
        await world.door.open()
        await world.ready(service.url)
        await world.store(problem_id, FILES, BODIES)


async def test_an_object_store_that_goes_and_comes_back(world: World, problem_id: str) -> None:
    """Every command that needs it says so, nothing is recorded meanwhile, and afterwards all goes on."""
    async with world.running() as service:
        await world.upload(problem_id, FILES, BODIES)
        await world.door.shut()
        commands = (
            PrepareUpload(problem_id=problem_id, files=FILES),
            StoreFiles(problem_id=problem_id, files=FILES),
            PresignDownload(problem_id=problem_id, key=key_of(problem_id, FILES[0])),
        )
        for command in commands:
            error = await world.platform.refused(command, key="the same")
            assert error.problem.code == "unavailable"
            assert "object store" in error.problem.detail
        assert "object store" in (await failures(service.url))["s3"]
        assert await world.events(problem_id) == []
        await world.door.open()
        await world.ready(service.url)
        await world.platform.send(commands[1], key="the same")
        await world.manifest(problem_id, 1)


async def test_an_object_store_that_says_nothing(world: World, problem_id: str) -> None:
    """Readiness does not wait for an answer that never comes."""
    async with world.running() as service:
        world.door.held_back = b"HEAD"
        assert "s3" in await failures(service.url)
        world.door.held_back = b""
        await world.door.shut()  # frees the threads that still wait
        await world.door.open()
        await world.ready(service.url)


async def test_a_crash_between_event_and_manifest_is_made_good(world: World, problem_id: str) -> None:
    """The event is the truth; the next life writes the manifest from it."""
    manifest = f"problems/{problem_id}/files/manifest.json"
    world.door.held_back = f"PUT /{world.bucket}/{manifest}".encode()
    async with world.process() as process:
        await world.store(problem_id, FILES, BODIES)
        await world.door.holding.wait()
        await process.kill()
        told = process.log.read_text()
    assert await world.object(manifest) is None
    assert [type(event) for event in await world.events(problem_id)] == [FilesStored]
    world.door.held_back = b""
    async with world.process():
        assert len((await world.manifest(problem_id, 1))["files"]) == len(FILES)
    for secret in ("X-Amz", world.s3.access_key, world.s3.secret_key, "made-up"):
        assert secret not in told


async def test_a_crash_in_the_middle_of_a_verification_costs_nothing(world: World, problem_id: str) -> None:
    """Nothing was recorded; the same request, sent again to the next life, is done once."""
    command = StoreFiles(problem_id=problem_id, files=FILES)
    async with world.process() as process:
        await world.upload(problem_id, FILES, BODIES)
        world.door.held_back = f"GET /{world.bucket}/{key_of(problem_id, FILES[0])}".encode()
        sent = world.platform.gateway.command(command, actor="setter", key="the same", timeout=2)
        asking = asyncio.create_task(sent)
        await world.door.holding.wait()
        await process.kill()
    world.door.held_back = b""
    async with world.process():
        reply = await world.platform.send(command, key="the same")
        assert await world.platform.send(command, key="the same") == reply
    with pytest.raises(FedotaError, match="timeout"):
        await asking
    assert [type(event) for event in await world.events(problem_id)] == [FilesStored]


async def test_what_was_done_needs_no_object_store(world: World, problem_id: str) -> None:
    """A repeated request is answered from the log; files that are stored are not read again."""
    async with world.running() as service:
        await world.upload(problem_id, FILES, BODIES)
        command = StoreFiles(problem_id=problem_id, files=FILES)
        first = await world.platform.send(command, key="again")
        await world.manifest(problem_id, 1)
        world.door.held_back = f"GET /{world.bucket}/problems".encode()
        await world.platform.send(command, key="another")
        assert not world.door.holding.is_set()
        await world.door.shut()
        assert "s3" in await failures(service.url)
        assert await world.platform.send(command, key="again") == first


async def test_deleted_files_leave_the_manifest(storage: World, problem_id: str) -> None:
    """Whatever changes a problem's files, the manifest follows."""
    await storage.store(problem_id, FILES, BODIES)
    await storage.platform.record(FilesDeleted(problem_id=problem_id, names=["data.csv"]))
    assert [file["name"] for file in (await storage.manifest(problem_id, 2))["files"]] == ["model.safetensors"]


async def test_a_large_file_is_never_held_in_memory(world: World, problem_id: str, tmp_path: Path) -> None:
    """50 MB are uploaded past us and read in a stream; the peak of the process hardly moves."""
    path = tmp_path / "large"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(50):
            piece = hashlib.sha256(bytes([number])).digest() * (MB // 32)
            digest.update(piece)
            file.write(piece)
    large = AnnouncedFile(name="large", size=50 * MB, sha256=digest.hexdigest())
    async with world.process() as process:
        await world.store(problem_id, FILES, BODIES)
        before = process.peak()
        (slot,) = await world.prepare(problem_id, [large])
        with path.open("rb") as file:
            assert await put(slot.url, file, slot.headers) == 200
        await world.platform.send(StoreFiles(problem_id=problem_id, files=[large]))
        assert process.peak() - before < 20 * MB
    assert isinstance((await world.events(problem_id))[-1], FilesStored)


async def test_unclaimed_uploads_go_after_their_time(world: World, problem_id: str) -> None:
    """What stands in an event stays whatever its age; so do manifests, checkpoints and what is none of ours."""
    lost, kept = announced("lost", b"lost"), announced("kept", b"kept")
    others = [f"problems/{problem_id}/checkpoints/1/1-{'a' * 16}.safetensors", "problems/else/files/x", "else"]
    async with world.running():
        await world.store(problem_id, FILES, BODIES)
        await world.store(problem_id, [announced("data.csv", b"newer")], {"data.csv": b"newer"})
        await world.manifest(problem_id, 2)
        await world.upload(problem_id, [lost], {"lost": b"lost"})
    for key in others:
        await world.plant(key, b"x")
    settings = world.settings()
    url = world.platform.role_url("storage")
    async with (
        connect_pool(url, "storage") as pool,
        Blobs.open(settings, Service("storage")) as blobs,
        world.platform.log("storage") as log,
    ):
        sweeper = Sweeper(log, blobs, Turns(pool), unclaimed=60, every=60)
        now = datetime.now(UTC)
        await sweeper.sweep(now - timedelta(minutes=1))
        assert await world.object(key_of(problem_id, lost)) == b"lost"
        await world.plant(key_of(problem_id, kept), b"kept")
        await sweeper.sweep(now + timedelta(minutes=1))
    assert await world.object(key_of(problem_id, lost)) is None
    assert await world.object(key_of(problem_id, kept)) is None
    assert await world.object(key_of(problem_id, FILES[1])) == DATA
    for key in (*others, f"problems/{problem_id}/files/manifest.json"):
        assert await world.object(key)


async def test_a_problem_at_work_does_not_keep_others_from_being_swept(
    world: World, problem_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is swept the next time."""
    monkeypatch.setattr("services.storage.sweeper._PATIENCE", 0.5)
    others, lost = [new_id() for _ in range(4)], announced("lost", b"lost")
    ids = sorted([problem_id, *others])
    url, settings = world.platform.role_url("storage"), world.settings()
    async with (
        connect_pool(url, "storage") as pool,
        Blobs.open(settings, Service("storage")) as blobs,
        world.platform.log("storage") as log,
    ):
        await blobs.create_bucket()
        async with pool.acquire(), pool.acquire():
            pass  # both connections are made: no part of its patience goes into that
        for one in ids:
            await world.plant(key_of(one, lost), b"lost")
        turns = Turns(pool)
        sweeper = Sweeper(log, blobs, turns, unclaimed=60, every=60)
        soon = datetime.now(UTC) + timedelta(minutes=1)
        async with turns.turn(ids[0], 5):
            await sweeper.sweep(soon)
        assert [await world.object(key_of(one, lost)) for one in ids] == [b"lost", None, None, None, None]
        await sweeper.sweep(soon)
        assert await world.object(key_of(ids[0], lost)) is None


async def test_storage_sweeps_by_itself(world: World, problem_id: str) -> None:
    """With an age of nothing, everything unclaimed is too old."""
    lost = announced("lost", b"lost")
    async with world.running(unclaimed_seconds=0, sweep_seconds=0.05):
        await world.upload(problem_id, [lost], {"lost": b"lost"})

        async def gone() -> bool:
            return await world.object(key_of(problem_id, lost)) is None

        await until(gone, "the upload is removed")
    assert await world.events(problem_id) == []


async def test_a_turn_is_one_processs_at_a_time(world: World, problem_id: str) -> None:
    """A second one waits as long as it has patience; another problem's turn is free; a lost connection frees it."""
    url = world.platform.role_url("storage")
    async with connect_pool(url, "storage") as one, connect_pool(url, "storage") as two:
        mine, theirs = Turns(one), Turns(two)
        async with mine.turn(problem_id, 5):
            with pytest.raises(FedotaError) as refused:
                async with theirs.turn(problem_id, 0.1):
                    raise AssertionError("two have the same turn")
            assert refused.value.problem.code == "timeout"
            async with theirs.turn(new_id(), 5):
                pass
        async with theirs.turn(problem_id, 5):
            waiting = asyncio.create_task(_take(mine, problem_id))
            await two.execute("select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted")
            await waiting


async def _take(turns: Turns, problem_id: str) -> None:
    async with turns.turn(problem_id, 10):
        pass


async def test_a_link_outlives_storage(world: World, problem_id: str) -> None:
    """Downloads do not depend on a process of ours."""
    async with world.running():
        await world.store(problem_id, FILES, BODIES)
        link = await world.download(problem_id, key_of(problem_id, FILES[1]))
    assert await got(link) == DATA


def _remove_bucket(world: World) -> None:
    """Storage's key reaches no other one, so what earlier tests have left in it goes too."""
    if not world.admin.bucket_exists(world.bucket):
        return
    for blob in world.admin.list_objects(world.bucket, recursive=True):
        assert blob.object_name is not None
        world.admin.remove_object(world.bucket, blob.object_name)
    world.admin.remove_bucket(world.bucket)
