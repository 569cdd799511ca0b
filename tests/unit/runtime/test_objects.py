"""The object store, as a coordinator meets it."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from fedota.contracts.runtime import Presigned, PresignRequest
from fedota.process import serving
from fedota.runtime.coordinator.objects import Objects, StoreError, WrongObjectError
from fedota.runtime.coordinator.platform import Platform
from fedota.runtime.sending import send_file

CONTENT = bytes(range(256)) * 12_000


class Store:
    """Breaks its first answers off in the middle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = ""
        self.breaks = 0
        self.ranges: list[str] = []
        self.puts: list[bytes] = []
        self.refusal: bytes | None = None
        self.knows_ranges = True

    async def presign(self, request: PresignRequest) -> Presigned:
        """An address here."""
        return Presigned(url=f"{self.url}/{request.key}", headers={})

    async def get(self, request: web.Request) -> web.StreamResponse:
        """The object, or the range of it that is asked for."""
        self.ranges.append(request.headers.get("Range", ""))
        if not self.breaks:
            return await send_file(request, self.path)
        self.breaks -= 1
        have = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        have *= self.knows_ranges
        response = web.StreamResponse(
            status=206 if have else 200,
            headers={
                "Content-Length": str(len(CONTENT) - have),
                "Content-Range": f"bytes {have}-{len(CONTENT) - 1}/{len(CONTENT)}",
            },
        )
        await response.prepare(request)
        await response.write(CONTENT[have : have + 1_000_000])
        assert request.transport is not None
        request.transport.close()
        return response

    async def put(self, request: web.Request) -> web.Response:
        """Take an object."""
        self.puts.append(await request.read())
        if self.refusal is not None:
            return web.Response(status=503, body=self.refusal)
        return web.Response()


@asynccontextmanager
async def objects(store: Store) -> AsyncIterator[Objects]:
    """Objects of this store."""
    app = web.Application(client_max_size=2**30)
    app.router.add_get("/{key}", store.get)
    app.router.add_put("/{key}", store.put)
    async with serving(app, "127.0.0.1", 0) as store.url, aiohttp.ClientSession() as http:
        yield Objects(cast("Platform", store), http)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One that holds an object."""
    path = tmp_path / "stored"
    path.write_bytes(CONTENT)
    return Store(path)


async def test_a_fetch_that_breaks_off_is_gone_on_with(store: Store, tmp_path: Path) -> None:
    """What is there already is not asked for again."""
    store.breaks, path = 2, tmp_path / "model.safetensors"
    wanted: Any = ("key", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), path)
    async with objects(store) as made:
        for _ in range(2):
            with pytest.raises(StoreError):
                await made.fetch(*wanted)
            assert not path.exists()
        await made.fetch(*wanted)
    assert path.read_bytes() == CONTENT
    assert store.ranges == ["", "bytes=1000000-", "bytes=2000000-"]


async def test_a_download_that_never_gets_further_is_no_progress(store: Store, tmp_path: Path) -> None:
    """A store without ranges breaks off each time: whoever waits for news would wait for ever."""
    store.breaks, store.knows_ranges, heard = 3, False, list[str]()
    path = tmp_path / "model.safetensors"
    async with objects(store) as made:
        for number in range(3):
            with pytest.raises(StoreError):
                await made.fetch("key", "", len(CONTENT), path, heard.append)
            assert bool(heard) == (number == 0)
            heard.clear()


async def test_a_part_that_was_damaged_is_not_the_stores_fault(store: Store, tmp_path: Path) -> None:
    """What a disk made of an earlier life's draft says nothing of the object: that is fetched anew, as a whole."""
    path = tmp_path / "model.safetensors"
    path.with_suffix(".new").write_bytes(bytes(1000))
    wanted: Any = ("key", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), path)
    async with objects(store) as made:
        with pytest.raises(StoreError, match="damaged"):
            await made.fetch(*wanted)
        assert list(tmp_path.glob("model.*")) == []
        await made.fetch(*wanted)
    assert path.read_bytes() == CONTENT and store.ranges == ["bytes=1000-", ""]


@pytest.mark.parametrize("changes", [{"size": len(CONTENT) - 1}, {"size": len(CONTENT) + 1}, {"sha256": "0" * 64}])
async def test_another_object_than_the_recorded_one_is_refused(
    store: Store, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """No other try would change that, and nothing of it is left."""
    wanted = {"key": "k", "sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT), **changes}
    path = tmp_path / "models" / "model.safetensors"
    path.parent.mkdir()
    async with objects(store) as made:
        with pytest.raises(WrongObjectError):
            await made.fetch(**wanted, path=path)
    assert not path.exists()


async def test_an_object_is_stored(store: Store) -> None:
    """With exactly these bytes."""
    async with objects(store) as made:
        await made.store("key", memoryview(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert store.puts == [CONTENT]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"<Error><Code>SlowDown</Code><Key>secret</Key><RequestId>1</RequestId></Error>", " (SlowDown)"),
        (b"<Code>\0</Code>\xff\0", ""),
        (b"", ""),
    ],
)
async def test_of_a_refusal_only_status_and_code_are_told(store: Store, body: bytes, code: str) -> None:
    """It becomes a round's reason, which everybody reads; and what differs each time would be recorded each time."""
    store.refusal = body
    async with objects(store) as made:
        with pytest.raises(StoreError) as caught:
            await made.store("key", memoryview(b"x"), hashlib.sha256(b"x").hexdigest())
    assert str(caught.value) == f"PUT of key was answered with 503{code}"
