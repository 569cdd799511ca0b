"""The embedded servers let nobody in who has no key, on any of their ports."""

import asyncio
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import nats.errors
import psutil
import pytest
from minio import Minio
from nats.aio.client import Client

from fedota.local.programs import Program, kept_alive
from fedota.local.state import DataDirectory, LocalError, Remembered, held, is_held
from tests.support.objects import content, opened
from tests.support.servers import RunningServers
from tests.support.waiting import until

_ASKED = [
    ("POST", "/col/delete?collection=fedota"),
    ("GET", "/dir/assign"),
    ("GET", "/dir/status"),
    ("GET", "/dir/lookup?volumeId=1"),
    ("POST", "/submit"),
    ("PUT", "/planted"),
    ("GET", "/buckets/fedota/kept"),
    ("DELETE", "/buckets?recursive=true"),
]


def _remembered(servers: RunningServers) -> Remembered:
    path = servers.nats_operator.parents[1] / "state.json"
    return msgspec.json.decode(path.read_bytes(), type=Remembered)


@pytest.fixture
def store(servers: RunningServers) -> Iterator[Minio]:
    """The object store, for who has its key, with one object in it."""
    with opened(servers.s3) as client:
        if not client.bucket_exists("fedota"):
            client.make_bucket("fedota")
        client.put_object("fedota", "kept", io.BytesIO(b"content"), 7)
        yield client


async def test_no_port_of_the_object_store_gives_or_takes_anything(servers: RunningServers, store: Minio) -> None:
    """`weed mini` opens a dozen ports; none of them reads, writes, deletes or hands out a token without a key."""
    ports = {name: port for name, port in _remembered(servers).ports.items() if name not in ("postgres", "nats")}
    assert {"master", "volume", "filer", "s3", "admin"} <= set(ports)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
        for name, port in ports.items():
            for method, path in _ASKED:
                try:
                    async with http.request(method, f"http://127.0.0.1:{port}{path}", data=b"x") as reply:
                        body = await reply.read()
                        assert reply.status in (400, 401, 403, 404, 405, 501), (name, method, path, reply.status, body)
                        assert b"auth" not in body.lower() or b"unauth" in body.lower()
                except aiohttp.ClientError:
                    continue  # shut, or no HTTP at all
    assert content(store, "fedota", "kept") == b"content"
    assert [item.object_name for item in store.list_objects("fedota") if item.object_name == "planted"] == []


async def test_nats_lets_nobody_in_without_credentials(servers: RunningServers) -> None:
    """Neither without any nor with a made-up token."""
    made_up: list[dict[str, Any]] = [{}, {"token": "made-up"}, {"user": "a", "password": "b"}]
    for options in made_up:
        client = Client()
        with pytest.raises((nats.errors.Error, OSError)):
            await client.connect(servers.nats_url, allow_reconnect=False, connect_timeout=5, **options)
        await client.close()


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    """Whoever mistypes --data-dir must not find a directory shut for everybody else."""
    (tmp_path / "of others").touch()
    tmp_path.chmod(0o755)
    for use in (DataDirectory, lambda path: held(path).__enter__()):
        with pytest.raises(LocalError, match="holds other things"):
            use(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755 and not is_held(tmp_path)


@pytest.mark.parametrize("path", ["file/below", "/proc/x"])
def test_a_place_that_cannot_be_is_said_in_words(tmp_path: Path, path: str) -> None:
    """Not as a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(LocalError, match="cannot be the data directory"):
        DataDirectory(tmp_path / path)


def test_a_damaged_state_is_said_in_words(tmp_path: Path) -> None:
    """Making new secrets in its place would shut out everything that knows the old ones."""
    (tmp_path / "state.json").write_bytes(b"{")
    with pytest.raises(LocalError, match="is damaged"):
        DataDirectory(tmp_path)


async def test_what_ends_is_started_again_whatever_goes_wrong_meanwhile(tmp_path: Path) -> None:
    """Also when the question whether it answers fails in a way that nobody foresaw."""
    asked: list[int] = []

    async def ready() -> bool:
        asked.append(1)
        if len(asked) == 2:
            raise OSError("no memory")
        return True

    program = Program("sleeper", ["sleep", "60"], tmp_path, ready)
    async with kept_alive(program):

        async def one() -> list[int]:
            return _sleepers(tmp_path)

        (first,) = await until(one, "it runs")
        os.kill(first, signal.SIGKILL)

        async def another() -> bool:
            return [pid for pid in _sleepers(tmp_path) if pid != first] != [] and len(asked) > 2

        await until(another, "it runs again")
    assert _sleepers(tmp_path) == []


def _sleepers(directory: Path) -> list[int]:
    processes = psutil.process_iter(["name", "cwd"])
    return [found.pid for found in processes if (found.info["name"], found.info["cwd"]) == ("sleep", str(directory))]


async def test_a_stranger_on_our_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    """The program ended because it lost its port; that somebody answers there does not make it run."""

    async def ready() -> bool:
        await asyncio.sleep(0.2)
        return True

    with pytest.raises(LocalError, match="ended before it answered"):
        async with kept_alive(Program("loser", ["false"], tmp_path, ready)):
            raise AssertionError("it does not run")
