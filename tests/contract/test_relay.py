"""The stream's sequence is the log's position, always: what the relay survives, and where it refuses to go on."""

import asyncio
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import msgspec
import nats.errors
import pytest
from nats.aio.client import Client
from nats.js.api import StreamConfig
from structlog.testing import capture_logs

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.events import NewEvent, uuid7
from fedota.kernel.bus import arrived, send_frames
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.nats_accounts import PERMISSIONS
from fedota.kernel.relay import Message, Relay, ensure_stream, publish_few
from fedota.kernel.service import Service
from tests.contract.ground import Ground, OwnNats, created, kill, readiness, requested
from tests.support.services import forget_stream, new_id, until

RELAY = "fedota.kernel.relay"
CONTEXT = Context(actor="test", correlation=uuid7())


async def append(log: EventLog, count: int) -> None:
    """So many events, in requests of one to seven."""
    requests: list[Append] = []
    while count:
        size = min(count, 1 + len(requests) % 7)
        problem_id, count = new_id(), count - size
        events = [NewEvent(data=requested(problem_id)) for _ in range(size)]
        requests.append(Append(subject=f"problems/{problem_id}", events=events, context=CONTEXT))
    await asyncio.gather(*map(log.append, requests))


@asynccontextmanager
async def relaying(ground: Ground) -> AsyncIterator[Relay]:
    """A relay in this process; nothing wakes it but itself."""
    async with ground.bus("relay") as bus, ground.log("relay") as log:
        relay = Relay(log, bus)
        async with Service("relay").running("relay", relay.run(asyncio.Event())):
            yield relay


async def agree(ground: Ground, count: int) -> None:
    """The stream holds what the log holds, all of it, at the same places, byte for byte."""
    await ground.reaches(count)
    assert await ground.stream() == await ground.told(ground.logs["problems"])
    assert await ground.logs["problems"].head() == count


async def test_sequence_is_position(ground: Ground) -> None:
    """Of what was there before the relay, of what comes later, of more than one batch takes."""
    await append(ground.logs["problems"], 1500)
    async with relaying(ground) as relay:
        await ground.reaches(1500)
        await append(ground.logs["problems"], 20)
        await agree(ground, 1520)
        assert relay.position == 1520
        await relay.check()


async def test_events_of_any_size_fit(ground: Ground) -> None:
    """A batch is bounded in bytes too, and none is refused because another one was sent before its turn."""
    for size, count in ((5_000, 100), (5_000, 2_000), (900_000, 12)):
        problem_id = new_id()
        events = [NewEvent(data=created(problem_id, name="x" * size)) for _ in range(count)]
        append = Append(subject=f"problems/{problem_id}", events=events, context=CONTEXT)
        await ground.logs["problems"].append(append)
    with capture_logs() as said:
        async with relaying(ground):
            await agree(ground, 2_112)
    assert [entry for entry in said if entry["event"] == "not confirmed"] == []


async def test_an_append_is_relayed_at_once(ground: Ground, tmp_path: Path) -> None:
    """The relay process is woken by the commit, long before it would look by itself."""
    async with ground.running(RELAY, "relay", tmp_path / "relay"):
        await _says(tmp_path / "relay")
        await append(ground.logs["problems"], 1)
        await ground.reaches(1)
        waits = []
        async with ground.nats() as client:
            subscription = await client.subscribe(subjects.inlet("*"))
            for _ in range(10):
                begun = asyncio.get_running_loop().time()
                await ground.record(created())
                await subscription.next_msg(timeout=5)
                waits.append(asyncio.get_running_loop().time() - begun)
        assert sorted(waits)[5] < 0.5, waits


async def test_two_relays_that_are_killed_all_the_time(ground: Ground, tmp_path: Path) -> None:
    """Two processes at once, one or the other killed with -9 in the middle of its work, again and again."""
    log = ground.logs["problems"]
    children = [await ground.program(RELAY, "relay", tmp_path / str(number)) for number in range(2)]
    try:
        for number in range(2):
            await readiness(tmp_path / str(number))
        total = 0
        for turn in range(6):
            before = await ground.last_sequence()
            appending = asyncio.create_task(append(log, 1200))
            total += 1200
            await until(lambda at=before: _moved(ground, at), "the stream moves")  # type: ignore[misc]
            victim = turn % 2
            await kill(children[victim])
            children[victim] = await ground.program(RELAY, "relay", tmp_path / str(victim))
            await appending
        for number in range(2):
            await readiness(tmp_path / str(number))
        for _ in range(40):  # both are woken by each of these, and both want to publish it
            await append(log, 1)
        await agree(ground, total + 40)
    finally:
        for child in children:
            await kill(child)


async def _moved(ground: Ground, at: int) -> bool:
    return await ground.last_sequence() > at


@pytest.mark.parametrize(
    ("count", "at"),
    [(500, 1), (500, 250), (500, 500), (500, 501), (6, 1), (6, 4), (6, 7)],
    ids=lambda number: str(number),
)
async def test_a_relay_that_dies_in_the_middle_of_its_work(
    ground: Ground, count: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any message of a batch or of a few, or after the last: the next relay goes on where the stream stands."""
    await append(ground.logs["problems"], count)
    async with ground.bus("relay") as bus, ground.log("relay") as log:
        sent = 0
        publish = bus.client.publish

        async def counted(subject: str, *args: Any, **more: Any) -> None:
            nonlocal sent
            if subject.startswith("fedota."):
                sent += 1
                if sent == at:
                    raise asyncio.CancelledError
            await publish(subject, *args, **more)
            if sent == at - 1 == count and subject.startswith("fedota."):
                await bus.client.flush()  # the commit has left, nobody waits for its answer any more
                raise asyncio.CancelledError

        async def framed(client: Client, frames: bytes) -> None:
            nonlocal sent
            parts = frames.split(b"HPUB ")[1:]
            assert len(parts) == count - 1
            sent += len(parts)
            if sent >= at:
                await send_frames(client, b"".join(b"HPUB " + part for part in parts[: at - 1]))
                raise asyncio.CancelledError
            await send_frames(client, frames)

        monkeypatch.setattr(bus.client, "publish", counted)
        monkeypatch.setattr("fedota.kernel.relay.send_frames", framed)
        monkeypatch.setattr("fedota.kernel.event_log._HANDFUL", 1000)  # all in one batch
        dying = asyncio.create_task(Relay(log, bus).run(asyncio.Event()))
        await asyncio.wait([dying], timeout=20)
        assert dying.cancelled(), "it did not die where it was to"
        monkeypatch.undo()
        await bus.client.flush()
    if at > count:
        await ground.reaches(count)
    await append(ground.logs["problems"], 3)
    async with relaying(ground):
        await agree(ground, count + 3)


async def test_another_relay_in_the_middle_of_a_few(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each single message names the one that it follows: nothing of two relays interleaves, and nothing comes twice."""
    await append(ground.logs["problems"], 6)
    async with ground.bus("relay") as bus, ground.log("relay") as log, ground.bus("anything") as other:
        rows, sent = await log.records(0), 0
        inlet = await ensure_stream(bus.client.jetstream())
        publish = bus.client.publish

        async def raced(subject: str, *args: Any, **more: Any) -> None:
            nonlocal sent
            sent += subject.startswith("fedota.")
            if sent == 3:  # two of them have left
                sent += 1
                await arrived(bus.client)
                await until(lambda: _moved(ground, 1), "two are stored")
                await publish_few(other, inlet, [Message.of(row) for row in rows[2:5]], 2, asyncio.Lock())
            await publish(subject, *args, **more)

        monkeypatch.setattr(bus.client, "publish", raced)
        async with Service("relay").running("relay", Relay(log, bus).run(asyncio.Event())):
            await agree(ground, 6)


async def test_frames_reach_the_server_in_their_place(bare: Ground) -> None:
    """nats-py has no public way for what `send_frames` does: this tells when its private way changes."""
    async with bare.bus("anything") as bus:
        subscription = await bus.client.subscribe("order.*")
        await bus.client.publish("order.1", b"a")
        await send_frames(bus.client, b"PUB order.2 1\r\nb\r\nPUB order.3 1\r\nc\r\n")
        await bus.client.publish("order.4", b"d")
        assert [(await subscription.next_msg(timeout=5)).data for _ in range(4)] == [b"a", b"b", b"c", b"d"]
        await bus.client.close()
        with pytest.raises(nats.errors.Error):
            await send_frames(bus.client, b"PUB order.2 1\r\nb\r\n")


async def test_a_relay_that_stood_still_while_another_took_over(ground: Ground, tmp_path: Path) -> None:
    """Stopped in the middle of its work and woken long after: what it still sends is refused, and it goes on."""
    log = ground.logs["problems"]
    async with ground.running(RELAY, "relay", tmp_path / "0") as still:
        await readiness(tmp_path / "0")
        appending = asyncio.create_task(append(log, 3000))
        await until(lambda: _moved(ground, 0), "the stream moves")
        os.kill(still.pid, signal.SIGSTOP)
        await appending
        async with ground.running(RELAY, "relay", tmp_path / "1"):
            await ground.reaches(3000)
            os.kill(still.pid, signal.SIGCONT)
            for _ in range(20):  # both are woken by each of these
                await append(log, 1)
            await agree(ground, 3020)
        await append(log, 5)
        await agree(ground, 3025)
        await _says(tmp_path / "0")


async def test_a_stream_from_an_older_copy_is_filled_up(ground: Ground, tmp_path: Path) -> None:
    """Its files were replaced by what they were before, while the relay ran: the relay goes on from there."""
    own = OwnNats(tmp_path / "nats")
    await own.start()
    try:
        beside = Ground(own.beside(ground.servers), ground.database_url)
        async with beside.running(RELAY, "relay", tmp_path / "relay"):
            await append(ground.logs["problems"], 300)
            await beside.reaches(300)
            await own.kill()
            store = tmp_path / "nats" / "nats" / "jetstream"
            shutil.copytree(store, tmp_path / "older")
            await own.start()
            await append(ground.logs["problems"], 1300)
            await beside.reaches(1600)
            await own.kill()
            shutil.rmtree(store)
            (tmp_path / "older").rename(store)
            await own.start()
            await beside.reaches(1600)
            assert await beside.stream() == await ground.told(ground.logs["problems"])
            await _says(tmp_path / "relay")
    finally:
        await own.kill()


async def test_a_wiped_stream_is_built_again(ground: Ground) -> None:
    """While the relay is idle, and while it is at work; whoever reads finds the same at the same places."""
    await append(ground.logs["problems"], 30)
    async with relaying(ground), ground.nats() as client:
        await ground.reaches(30)
        first = await ground.stream()
        for count in (30, 1230):
            if count > 30:
                await append(ground.logs["problems"], 1200)
            await client.jetstream().delete_stream(subjects.STREAM)
            await agree(ground, count)
        assert (await ground.stream())[:30] == first


async def test_a_stream_that_another_relay_made_again(ground: Ground) -> None:
    """It takes events elsewhere than the one before: a relay that goes on must not publish where nobody listens."""
    async with relaying(ground) as relay:
        await append(ground.logs["problems"], 1)
        await ground.reaches(1)
        await forget_stream(ground.servers.nats_url, ground.servers.nats_keys["anything"])
        async with ground.bus("relay") as bus:
            await ensure_stream(bus.client.jetstream())
        await append(ground.logs["problems"], 20)
        await agree(ground, 21)
        assert relay.diverged is None


async def test_a_stream_cannot_be_thinned_out(ground: Ground) -> None:
    """No message of it can be deleted and it cannot be purged, whoever asks; a roll-up header empties nothing."""
    await append(ground.logs["problems"], 5)
    async with relaying(ground), ground.nats() as client:
        await ground.reaches(5)
        js = client.jetstream()
        for verb, body in (("MSG.DELETE", b'{"seq":2}'), ("PURGE", b"")):
            answer = await client.request(f"$JS.API.STREAM.{verb}.{subjects.STREAM}", body)
            assert b'"error"' in answer.data, verb
        inlet = await ensure_stream(js)
        with pytest.raises(Exception, match="rollup"):
            await js.publish(subjects.into(inlet, "fedota.events.X.y"), b"", headers={"Nats-Rollup": "all"})
        await agree(ground, 5)


async def test_a_log_from_an_older_copy_is_refused(ground: Ground, tmp_path: Path) -> None:
    """The relay publishes nothing, is not ready, and says what to do; that done, it goes on."""
    await append(ground.logs["problems"], 20)
    async with _copy(ground) as older:
        await append(ground.logs["problems"], 30)
        async with relaying(ground):
            await ground.reaches(50)
        async with older.running(RELAY, "relay", tmp_path / "relay"):
            await _says(tmp_path / "relay", "50 events, the log only 20", "Restore a newer copy")
            # The older log moves on and past the stream: now both are as long, and tell different stories.
            async with older.log("problems") as log:
                await append(log, 40)
                await _says(tmp_path / "relay", "different events at position 50")
                assert await ground.last_sequence() == 50
                async with ground.nats() as client:
                    await client.jetstream().delete_stream(subjects.STREAM)
                await _says(tmp_path / "relay")
                await ground.reaches(60)
                assert await ground.stream() == await ground.told(log)


async def test_a_log_that_is_replaced_under_a_running_relay(ground: Ground) -> None:
    """By an older copy, which then goes on past the stream before the relay looks: nothing of it is published."""
    await append(ground.logs["problems"], 30)
    async with relaying(ground) as relay:
        await ground.reaches(30)
        async with ground.superuser() as connection:
            await connection.execute(
                "begin; set local session_replication_role = replica;"
                "alter table fedota.events disable trigger all; delete from fedota.events where position > 10;"
                "alter table fedota.events enable always trigger append_only;"
            )
            for position in range(11, 41):
                await connection.execute(
                    "insert into fedota.events select $1::bigint, gen_random_uuid(), type, schema, subject,"
                    " version + 1000, time, actor, correlation, causation, traceparent, data, sha256(hash || data)"
                    " from fedota.events where position = $1::bigint - 1",
                    position,
                )
            await connection.execute("update fedota.head set position = 40; commit")

        async def refused() -> bool:
            return "restored from an" in (relay.diverged or "")

        await until(refused, "the relay refuses")
        assert await ground.last_sequence() == 30
        with pytest.raises(FedotaError, match="rebuild the read models"):
            await relay.check()


async def test_nobody_has_a_reply_stored(ground: Ground) -> None:
    """The server sends its answers wherever who asks wants them; the stream takes none of them for an event."""
    await append(ground.logs["problems"], 5)
    async with relaying(ground):
        await ground.reaches(5)
        for process in PERMISSIONS:
            async with ground.nats(process) as client:
                for subject, body in _requests(process):
                    for reply in (subjects.event("RoundUpdated", new_id()), "fedota.relay.x.RoundUpdated.y"):
                        await client.publish(subject, body, reply=reply)
                await arrived(client)
        await append(ground.logs["problems"], 5)
        await agree(ground, 10)
        async with ground.nats("problems") as client:  # and nobody but the relay is told where it listens
            with pytest.raises(nats.errors.Error):
                await client.jetstream(timeout=0.5).stream_info(subjects.STREAM)


def _requests(process: str) -> list[tuple[str, bytes]]:
    """What this process may ask the server or others for."""
    config = {"durable_name": process, "ack_policy": "none", "deliver_policy": "all"}
    create = msgspec.json.encode({"stream_name": subjects.STREAM, "config": config})
    bodies = {"DURABLE.CREATE": create, "MSG.NEXT": b'{"batch":3,"no_wait":true}', "INFO": b"", "DELETE": b""}
    mine = [(f"$JS.API.CONSUMER.{verb}.{subjects.STREAM}.{process}", body) for verb, body in bodies.items()]
    stream = [(f"$JS.API.STREAM.INFO.{subjects.STREAM}", b""), (f"$JS.API.DIRECT.GET.{subjects.STREAM}", b'{"seq":1}')]
    return [*(stream if process == "relay" else mine), (subjects.command("problems", "StartProblem"), b"{}")]


async def test_a_stream_that_listens_where_all_may_reply_is_refused(ground: Ground, tmp_path: Path) -> None:
    """It was made by a version that did not know better; deleting it is all that is to be done."""
    await append(ground.logs["problems"], 5)
    async with ground.nats() as client:
        await client.jetstream().add_stream(StreamConfig(name=subjects.STREAM, subjects=[subjects.EVENTS]))
        async with ground.running(RELAY, "relay", tmp_path / "relay"):
            await _says(tmp_path / "relay", "earlier version", "Delete the stream")
            await client.jetstream().delete_stream(subjects.STREAM)
            await _says(tmp_path / "relay")
            await agree(ground, 5)


async def _says(directory: Path, *words: str) -> None:
    """Return when a relay's readiness says this, or is well when it is to say nothing."""

    async def said() -> bool:
        found = await readiness(directory)
        if not words:
            return bool(found["code"] == 200)
        return found["code"] == 503 and all(word in found["failing"].get("diverged", "") for word in words)

    await until(said, f"readiness says {words}")


@asynccontextmanager
async def _copy(ground: Ground) -> AsyncIterator[Ground]:
    """A copy of the log as it is now."""
    name = f"copy_{secrets.token_hex(4)}"
    original = urlsplit(ground.database_url).path[1:]
    admin = await asyncpg.connect(ground.servers.admin_url)
    try:
        for log in ground.logs.values():
            await log._pool.expire_connections()
        await admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
            original,
        )
        await admin.execute(f"create database {name} template {original}")
        yield Ground(ground.servers, urlunsplit(urlsplit(ground.database_url)._replace(path=f"/{name}")))
        await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


async def test_nats_is_killed_and_comes_back(ground: Ground, tmp_path: Path) -> None:
    """With -9, while events are appended and relayed: nothing is lost, repeated or out of order."""
    own = OwnNats(tmp_path / "nats")
    await own.start()
    try:
        beside = Ground(own.beside(ground.servers), ground.database_url)
        async with beside.running(RELAY, "relay", tmp_path / "relay"):
            await _says(tmp_path / "relay")
            appending = asyncio.create_task(append(ground.logs["problems"], 3000))
            await until(lambda: _moved(beside, 0), "the stream moves")
            await own.kill()
            await appending  # events are recorded whether NATS is there or not

            async def misses_nats() -> bool:
                return "nats" in (await readiness(tmp_path / "relay"))["failing"]

            await until(misses_nats, "the relay notices that NATS has gone")
            await own.start()
            await beside.reaches(3000)
            assert await beside.stream() == await ground.told(ground.logs["problems"])
            await _says(tmp_path / "relay")
    finally:
        await own.kill()
