"""Nobody says on NATS what is not theirs to say."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.kernel.bus import Bus, arrived
from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import PERMISSIONS, Minted, Operator, delete_account, push_account
from fedota.kernel.relay import ensure_stream
from tests.contract.ground import Ground
from tests.support.services import new_id, until

SERVICES = ("problems", "storage", "orchestrator", "rounds")
STREAM_VERBS = ("DELETE", "PURGE", "UPDATE", "MSG.DELETE", "SNAPSHOT", "RESTORE")


class Person:
    """A connection, and what the server refused it."""

    def __init__(self, client: Client, errors: list[str]) -> None:
        self.client = client
        self.errors = errors

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, credentials: Path, prefix: str) -> AsyncIterator["Person"]:
        """Connected; refusals are noted."""
        errors: list[str] = []

        async def note(error: Exception) -> None:
            errors.append(str(error))

        client = await nats.connect(
            url, user_credentials=str(credentials), inbox_prefix=prefix.encode(), error_cb=note, allow_reconnect=False
        )
        try:
            yield cls(client, errors)
        finally:
            await client.close()

    async def refused(self, publish: list[str], subscribe: list[str]) -> set[str]:
        """Those of these subjects that the server refused."""
        for subject in publish:
            await self.client.publish(subject, b"{}")
        for subject in subscribe:
            await self.client.subscribe(subject)
        await arrived(self.client)
        found = [re.search(r'permissions violation for \w+ to "([^"]+)"', error.lower()) for error in self.errors]
        refused = {match.group(1) for match in found if match}
        return {subject for subject in (*publish, *subscribe) if subject.lower() in refused}


def _not_theirs(process: str) -> tuple[list[str], list[str]]:
    """What a process of the platform has no business with: to publish, and to listen to."""
    others = [name for name in PERMISSIONS if name != process]
    publish = [
        *(f"$JS.API.STREAM.{verb}.{subjects.STREAM}" for verb in STREAM_VERBS),
        *(f"$JS.API.CONSUMER.{verb}.{subjects.STREAM}.{name}" for name in others for verb in ("DELETE", "MSG.NEXT")),
        *(f"$JS.API.CONSUMER.DURABLE.CREATE.{subjects.STREAM}.{name}" for name in others),
        *(f"_INBOX_{name}.x.y" for name in others),
        "$SYS.REQ.CLAIMS.UPDATE",
        "$JS.API.STREAM.CREATE.OTHER",
        subjects.runtime("p", "report"),
        "elsewhere",
    ]
    subscribe = [
        *(f"_INBOX_{name}.>" for name in others),
        *(subjects.command(name, "*") for name in SERVICES if name != process),
        subjects.EVENTS,
        "$JS.>",
        "fedota.>",
        ">",
    ]
    if process != "relay":
        publish += [subjects.event("ProblemCreated", "p"), f"$JS.API.STREAM.CREATE.{subjects.STREAM}"]
    if process != "gateway":
        publish += [subjects.command(name, "X") for name in SERVICES]
    return publish, subscribe


@pytest.mark.parametrize("process", PERMISSIONS)
async def test_a_process_is_refused_what_is_not_its_own(bare: Ground, process: str) -> None:
    """Everything that another process says or hears, and everything that changes the stream."""
    async with bare.nats() as witness:
        await ensure_stream(witness.jetstream())
        keys = bare.servers.nats_keys[process]
        async with Person.connect(bare.servers.nats_url, keys, f"_INBOX_{process}") as person:
            publish, subscribe = _not_theirs(process)
            assert await person.refused(publish, subscribe) == {*publish, *subscribe}
        assert (await witness.jetstream().stream_info(subjects.STREAM)).state.last_seq == 0


async def is_let_in(url: str, credentials: Path | None) -> bool:
    """Whether the server takes a connection with these credentials."""

    async def ignore(_: Exception) -> None:
        """The outcome says it."""

    client = Client()
    try:
        await client.connect(
            url, user_credentials=str(credentials) if credentials else None, allow_reconnect=False, error_cb=ignore
        )
    except nats.errors.Error:
        return False
    else:
        return True
    finally:
        transport = client._transport
        await client.close()
        if transport:  # nats-py leaves it open after a refusal
            transport.close()  # type: ignore[no-untyped-call]


async def test_nobody_comes_in_without_credentials(bare: Ground, tmp_path: Path) -> None:
    """Nor with those of another operator."""
    stranger, _ = Operator.create()
    keys, _ = stranger.platform_account()
    write_private(tmp_path / "stranger.creds", keys.process_credentials("relay").encode())
    url = bare.servers.nats_url
    assert not await is_let_in(url, None)
    assert not await is_let_in(url, tmp_path / "stranger.creds")
    assert await is_let_in(url, bare.servers.nats_keys["relay"])


@asynccontextmanager
async def problem(bare: Ground, problem_id: str, directory: Path) -> AsyncIterator[tuple[Minted, Person]]:
    """A problem's account, known to the server, and its coordinator in it."""
    operator = Operator.read(bare.servers.nats_operator)
    minted = operator.problem_account(problem_id, platform=bare.servers.platform_account)
    async with bare.nats("system") as system:
        await push_account(system, minted.jwt)
        await push_account(system, minted.jwt)  # harmless when repeated
    path = directory / f"{problem_id}.creds"
    write_private(path, minted.credentials.encode())
    async with Person.connect(bare.servers.nats_url, path, "_INBOX") as person:
        yield minted, person


@asynccontextmanager
async def storage(bare: Ground) -> AsyncIterator[list[tuple[str, bytes]]]:
    """A storage service that notes what it is asked."""
    asked: list[tuple[str, bytes]] = []

    async def answer(subject: str, body: bytes) -> bytes:
        asked.append((subject, body))
        return b"answer"

    async with bare.bus("storage") as bus:
        await bus.answer({subjects.runtime("*", "presign"): answer})
        yield asked


async def test_a_coordinator_reaches_its_own_subjects_only(bare: Ground, tmp_path: Path) -> None:
    """Its requests are answered; another problem's, events, the stream and the platform's talk are out of reach."""
    mine, other = new_id(), new_id()
    async with (
        storage(bare) as asked,
        bare.nats() as witness,
        problem(bare, mine, tmp_path) as (_, person),
        problem(bare, other, tmp_path) as (_, another),
    ):
        await ensure_stream(witness.jetstream())
        subject = subjects.runtime(mine, "presign")
        assert (await person.client.request(subject, b"body", timeout=5)).data == b"answer"
        publish = [
            subjects.runtime(other, "presign"),
            subjects.event("RoundUpdated", mine),
            subjects.command("problems", "StopProblem"),
            f"$JS.API.STREAM.INFO.{subjects.STREAM}",
            f"$JS.API.CONSUMER.MSG.NEXT.{subjects.STREAM}.gateway",
            "$SYS.REQ.CLAIMS.UPDATE",
            "_INBOX_storage.x",
        ]
        subscribe = [subjects.runtime("*", "*"), subjects.EVENTS, "_INBOX_gateway.>", ">", "$SRV.>"]
        assert await person.refused(publish, subscribe) == {*publish, *subscribe}
        assert asked == [(subject, b"body")]
        assert (await another.client.request(subjects.runtime(other, "presign"), b"", timeout=5)).data == b"answer"


async def test_a_reply_subject_is_no_way_into_the_stream(bare: Ground, tmp_path: Path) -> None:
    """A request whose answer is to go where events go: it stays within the problem's own account."""
    mine = new_id()
    async with storage(bare) as asked, bare.nats() as witness, problem(bare, mine, tmp_path) as (_, person):
        await ensure_stream(witness.jetstream())
        heard = await witness.subscribe(">")
        await arrived(witness)
        for reply in (subjects.event("RoundUpdated", mine), f"_INBOX_rounds.{mine}", subjects.runtime(new_id(), "x")):
            await person.client.publish(subjects.runtime(mine, "presign"), b"", reply=reply)
        await person.client.request(subjects.runtime(mine, "presign"), b"last", timeout=5)
        await until(lambda: _are(asked, 4), "storage has answered all of them")
        await arrived(witness)
        found = [heard._pending_queue.get_nowait().subject for _ in range(heard.pending_msgs)]
        assert not [one for one in found if "events" in one or "_INBOX_rounds" in one]
        assert (await witness.jetstream().stream_info(subjects.STREAM)).state.last_seq == 0


async def _are(asked: list[tuple[str, bytes]], count: int) -> bool:
    return len(asked) == count


async def test_a_deleted_account_is_dead(bare: Ground, tmp_path: Path) -> None:
    """Its connections are cut at once and its credentials open nothing any more; the others stay."""
    mine, other = new_id(), new_id()
    operator = Operator.read(bare.servers.nats_operator)
    async with (
        storage(bare),
        problem(bare, mine, tmp_path) as (minted, person),
        problem(bare, other, tmp_path) as (_, another),
    ):
        async with bare.nats("system") as system:
            await delete_account(system, operator, minted.account)
            await delete_account(system, operator, minted.account)  # harmless when repeated
        await until(lambda: _closed(person), "the connection is cut")
        assert not await is_let_in(bare.servers.nats_url, tmp_path / f"{mine}.creds")
        assert await is_let_in(bare.servers.nats_url, tmp_path / f"{other}.creds")
        assert (await another.client.request(subjects.runtime(other, "presign"), b"", timeout=5)).data == b"answer"


async def _closed(person: Person) -> bool:
    return person.client.is_closed


async def test_only_the_operator_makes_accounts(bare: Ground, tmp_path: Path) -> None:
    """An account that somebody else signed lets nobody in, and a deletion that somebody else signed deletes nothing."""
    stranger, _ = Operator.create()
    minted = stranger.problem_account(new_id(), platform=bare.servers.platform_account)
    write_private(tmp_path / "stranger.creds", minted.credentials.encode())
    async with bare.nats("system") as system:
        await push_account(system, minted.jwt)
        assert not await is_let_in(bare.servers.nats_url, tmp_path / "stranger.creds")
        with pytest.raises(FedotaError, match="refused the account"):
            await delete_account(system, stranger, bare.servers.platform_account)
    async with Bus.connect(bare.servers.nats_url, "relay", bare.servers.nats_keys["relay"]) as bus:
        await bus.check()


async def test_a_server_that_does_not_answer_is_told_as_such(bare: Ground) -> None:
    """Who waits for an account hears that NATS takes none now."""
    async with bare.nats("system") as system:
        await system.close()
        with pytest.raises(FedotaError, match="NATS does not take accounts now"):
            await asyncio.wait_for(push_account(system, "jwt"), 10)
