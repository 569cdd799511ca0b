"""From an announcement to a recorded file, and every way in which that may fail."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from fedota.contracts.commands import AnnouncedFile, PrepareUpload, StoreFiles, UploadSlot
from fedota.events.storage import FilesRejected, FilesStored, StoredFile
from tests.integration.storage.conftest import BODIES, DATA, FILES, MODEL, World, announced, asked, key_of, put
from tests.support.services import new_id

CSV = FILES[1]


def stored(problem_id: str, *files: AnnouncedFile) -> FilesStored:
    """What is recorded of these."""
    return FilesStored(
        problem_id=problem_id,
        files=[
            StoredFile(name=file.name, role=file.role, key=key_of(problem_id, file), sha256=file.sha256, size=file.size)
            for file in files
        ],
    )


async def test_files_are_uploaded_verified_recorded_and_listed(storage: World, problem_id: str) -> None:
    """The whole way: slots, PUTs, the event with its cause, the manifest; and nothing is asked for twice."""
    slots = await storage.prepare(problem_id, FILES)
    assert [slot.name for slot in slots] == [file.name for file in FILES]
    assert all(set(slot.headers) == {"Content-Length", "x-amz-checksum-sha256", "If-None-Match"} for slot in slots)
    for slot in slots:
        assert await put(slot.url, BODIES[slot.name], slot.headers) == 200
    reply = await storage.platform.send(StoreFiles(problem_id=problem_id, files=FILES), actor="setter", key="k")
    (event,) = await storage.platform.events(f"storage/{problem_id}")
    assert event.data == stored(problem_id, *FILES)
    assert (event.actor, event.position) == ("setter", reply.position)
    assert [await storage.object(key_of(problem_id, file)) for file in FILES] == [MODEL, DATA]
    assert await storage.manifest(problem_id, 1) == {
        "problem_id": problem_id,
        "version": 1,
        "files": [msgspec.to_builtins(file) for file in stored(problem_id, FILES[1], FILES[0]).files],
    }
    assert await storage.prepare(problem_id, FILES) == []


async def test_a_newer_file_of_a_name_replaces_the_older(storage: World, problem_id: str) -> None:
    """The event names what is new and no more; the manifest lists what the problem has now; the old object stays."""
    await storage.store(problem_id, FILES, BODIES)
    newer = announced("data.csv", b"newer")
    await storage.store(problem_id, [FILES[0], newer], {"data.csv": b"newer"})
    assert (await storage.events(problem_id))[1:] == [stored(problem_id, newer)]
    listed = (await storage.manifest(problem_id, 2))["files"]
    assert [file["sha256"] for file in listed] == [newer.sha256, FILES[0].sha256]
    assert await storage.object(key_of(problem_id, CSV)) == DATA


async def test_files_that_are_stored_already_are_not_recorded_again(storage: World, problem_id: str) -> None:
    """Another request for the same files succeeds and says nothing new."""
    first = await storage.store(problem_id, FILES, BODIES)
    again = await storage.platform.send(StoreFiles(problem_id=problem_id, files=FILES))
    assert again.position >= first
    assert len(await storage.events(problem_id)) == 1


async def _in_pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _without(slot: UploadSlot, name: str) -> dict[str, str]:
    return {header: value for header, value in slot.headers.items() if header != name}


async def _wrong_puts(slot: UploadSlot) -> list[int]:
    other = DATA[::-1]
    own = announced("x", other)
    checksum = "x-amz-checksum-sha256"
    headers = slot.headers
    return [
        await put(slot.url, other, headers),
        await put(slot.url, DATA + b"x", {**headers, "Content-Length": str(len(DATA) + 1)}),
        await put(slot.url, DATA[:-1], {**headers, "Content-Length": str(len(DATA) - 1)}),
        await put(slot.url, other, {**headers, checksum: own.sha256}),
        await put(slot.url, other, _without(slot, checksum)),
        await put(slot.url, DATA, _without(slot, "If-None-Match")),
        await put(slot.url, _in_pieces(DATA), _without(slot, "Content-Length")),
        await put(slot.url.replace("data.csv", "data2.csv"), DATA, headers),
        await put(slot.url.replace("Expires=900", "Expires=90000"), DATA, headers),
        await asked("GET", slot.url, data=DATA, headers=headers),
        await asked("DELETE", slot.url, data=DATA, headers=headers),
    ]


async def test_a_slot_takes_the_announced_bytes_once_and_nothing_else(storage: World, problem_id: str) -> None:
    """Length, digest, key, method and expiry are signed, and S3 holds to all of them."""
    (slot,) = await storage.prepare(problem_id, [CSV])
    assert set(await _wrong_puts(slot)) <= {400, 403}
    assert await storage.object(key_of(problem_id, CSV)) is None
    assert await put(slot.url, DATA, slot.headers) == 200
    assert await put(slot.url, DATA, slot.headers) == 412
    assert await storage.object(key_of(problem_id, CSV)) == DATA


async def test_an_upload_that_breaks_off_leaves_nothing(storage: World, problem_id: str) -> None:
    """A setter whose connection dies in the middle tries again with the same slot."""
    body = b"x" * 1_000_000
    big = announced("big", body)
    (slot,) = await storage.prepare(problem_id, [big])
    place = urlsplit(slot.url)
    head = f"PUT {place.path}?{place.query} HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in slot.headers.items()) + "\r\n"

    def break_off() -> None:
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + body[: len(body) // 2])

    await asyncio.to_thread(break_off)
    assert await put(slot.url, body, slot.headers) == 200
    await storage.platform.send(StoreFiles(problem_id=problem_id, files=[big]))
    assert await storage.events(problem_id) == [stored(problem_id, big)]


async def test_an_empty_file_is_a_file(storage: World, problem_id: str) -> None:
    """S3 and we agree on what nothing is."""
    empty = announced("empty", b"")
    await storage.store(problem_id, [empty], {"empty": b""})
    assert await storage.events(problem_id) == [stored(problem_id, empty)]


PICKLE = b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00 this is no safetensors file"


@pytest.mark.parametrize(
    ("file", "there", "word"),
    [
        (announced("f", DATA), None, "not uploaded"),
        (announced("f", DATA), DATA[:-1], f"{len(DATA) - 1} bytes"),
        (announced("f", DATA), DATA + b"x", f"{len(DATA) + 1} bytes"),
        (announced("f", DATA), DATA[::-1], hashlib.sha256(DATA[::-1]).hexdigest()),
        (announced("f", PICKLE, "model"), PICKLE, "not a safetensors file"),
        (announced("f", MODEL[:-1], "model"), MODEL[:-1], "not a safetensors file"),
    ],
    ids=["missing", "short", "long", "other bytes", "pickle", "cut model"],
)
async def test_a_wrong_file_refuses_its_whole_upload(
    storage: World, problem_id: str, file: AnnouncedFile, there: bytes | None, word: str
) -> None:
    """Even where S3 took it: nothing is stored, the wrong object goes, the good one need not be sent again."""
    await storage.upload(problem_id, [CSV], BODIES)
    if there is not None:
        await storage.plant(key_of(problem_id, file), there)
    error = await storage.platform.refused(StoreFiles(problem_id=problem_id, files=[CSV, file]))
    assert error.problem.code == "file_rejected"
    assert list(error.problem.fields) == ["f"]
    assert word in error.problem.fields["f"]
    (event,) = await storage.events(problem_id)
    assert isinstance(event, FilesRejected)
    assert [(one.name, one.reason) for one in event.files] == [("f", error.problem.fields["f"])]
    assert await storage.object(key_of(problem_id, file)) is None
    assert [slot.name for slot in await storage.prepare(problem_id, [CSV, file])] == ["f"]


async def test_after_a_rejection_the_right_file_is_taken(storage: World, problem_id: str) -> None:
    """The slot works again, because the wrong object is gone."""
    await storage.plant(key_of(problem_id, CSV), DATA[::-1])
    assert (
        await storage.platform.refused(StoreFiles(problem_id=problem_id, files=[CSV]))
    ).problem.code == "file_rejected"
    await storage.store(problem_id, [CSV], BODIES)
    assert (await storage.events(problem_id))[1:] == [stored(problem_id, CSV)]


async def test_a_verified_object_outlives_every_rejection(storage: World, problem_id: str) -> None:
    """Announced once more with another size, or as a model: the events of before still speak of it."""
    await storage.store(problem_id, [CSV], BODIES)
    for wrong in (msgspec.structs.replace(CSV, size=CSV.size + 1), msgspec.structs.replace(CSV, role="model")):
        error = await storage.platform.refused(StoreFiles(problem_id=problem_id, files=[wrong]))
        assert error.problem.code == "file_rejected"
        assert await storage.object(key_of(problem_id, CSV)) == DATA


@pytest.mark.parametrize(
    "files",
    [[announced("model2.safetensors", MODEL, "model")], [CSV, announced("data.csv", b"other")]],
    ids=["second model", "name twice"],
)
async def test_a_wrong_announcement_is_refused_before_the_upload_and_after(
    storage: World, problem_id: str, files: list[AnnouncedFile]
) -> None:
    """Whoever uploads for hours is told beforehand; whoever does not ask beforehand is told, too."""
    await storage.store(problem_id, FILES, BODIES)
    before = await storage.platform.refused(PrepareUpload(problem_id=problem_id, files=files))
    after = await storage.platform.refused(StoreFiles(problem_id=problem_id, files=files))
    assert before.problem == after.problem
    assert before.problem.code == "file_rejected"
    assert [type(event) for event in await storage.events(problem_id)] == [FilesStored, FilesRejected]


async def test_a_repeated_request_gets_the_first_answer(storage: World, problem_id: str) -> None:
    """Same key, same answer, one event; the key is the actor's own and good for one body."""
    await storage.upload(problem_id, FILES, BODIES)
    send, refused = storage.platform.send, storage.platform.refused
    command = StoreFiles(problem_id=problem_id, files=FILES)
    first = await send(command, key="again")
    await storage.store(problem_id, [announced("later", b"later")], {"later": b"later"})
    assert await send(command, key="again") == first
    other = StoreFiles(problem_id=problem_id, files=[CSV])
    assert (await refused(other, key="again")).problem.code == "key_reused"
    await send(other, key="again", actor="another setter")
    assert len(await storage.events(problem_id)) == 2


async def test_a_repeated_failure_is_the_same_failure(storage: World, problem_id: str) -> None:
    """Even when the file has come since: a new try is a new request."""
    command = StoreFiles(problem_id=problem_id, files=[CSV])
    first = await storage.platform.refused(command, key="again")
    await storage.upload(problem_id, [CSV], BODIES)
    assert (await storage.platform.refused(command, key="again")).problem == first.problem
    assert [type(event) for event in await storage.events(problem_id)] == [FilesRejected]
    await storage.platform.send(command, key="new")
    assert (await storage.events(problem_id))[1:] == [stored(problem_id, CSV)]


async def test_requests_at_the_same_time_record_once(storage: World, problem_id: str) -> None:
    """However many ask, with one key or with many."""
    await storage.upload(problem_id, FILES, BODIES)
    command = StoreFiles(problem_id=problem_id, files=FILES)
    keys = ["same"] * 8 + [f"key {number}" for number in range(8)]
    await asyncio.gather(*(storage.platform.send(command, key=key) for key in keys))
    assert len(await storage.events(problem_id)) == 1


async def test_two_storages_are_as_good_as_one(storage: World) -> None:
    """Both answer, and a problem's files are recorded once."""
    problems = [new_id() for _ in range(8)]
    async with storage.running():
        for problem_id in problems:
            await storage.upload(problem_id, FILES, BODIES)
        commands = [StoreFiles(problem_id=problem_id, files=FILES) for problem_id in problems for _ in range(4)]
        await asyncio.gather(*(storage.platform.send(command) for command in commands))
        for problem_id in problems:
            assert await storage.events(problem_id) == [stored(problem_id, *FILES)]
            await storage.manifest(problem_id, 1)


@pytest.mark.parametrize("kind", [PrepareUpload, StoreFiles])
@pytest.mark.parametrize("wrong", ["..", "x", "urn:uuid:01890a5d-ac96-774b-bcce-b302099a8057"])
async def test_an_id_that_is_no_uuid_is_refused(storage: World, kind: Any, wrong: str) -> None:
    """It would be part of a key."""
    error = await storage.platform.refused(kind(problem_id=wrong, files=[CSV]))
    assert error.problem.code == "invalid_field"
    assert list(error.problem.fields) == ["problem_id"]
