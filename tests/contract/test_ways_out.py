"""Every way out of a problem's NATS account that we know of, tried by somebody who holds its credentials.

A witness in the platform's account, whom nothing is denied, sees everything that arrives there. What may arrive is the
problem's own requests, and nothing else; what the stream holds must not change at all.
"""

import base64
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any, Final

import msgspec
import nkeys
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from fedota.contracts import subjects
from fedota.kernel.bus import arrived
from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import PERMISSIONS, AccountKeys, Minted, Permissions, _sign
from fedota.kernel.relay import ensure_stream
from tests.contract.ground import Ground
from tests.contract.test_nats_accounts import STREAM_VERBS, Person, is_let_in, problem
from tests.support.services import new_id, until

VERBS: Final = ("report", "resume", "revoked", "presign")
_CONNECTIONS: Final = 16
_SUBSCRIPTIONS: Final = 64


class Prison:
    """Two problems' accounts beside the platform's, and a witness who hears all that arrives in the platform's."""

    def __init__(self, ground: Ground, witness: Client, mine: str, other: str) -> None:
        self.ground = ground
        self.mine = mine
        self.other = other
        self.minted: Minted
        self.inside: Person
        self.neighbour: Person
        self.heard: list[str] = []
        self.answers: set[str] = set()  # where the server will have the problem's requests answered
        self.asked: list[tuple[str, bytes]] = []
        self._witness = witness

    @classmethod
    @asynccontextmanager
    async def open(cls, ground: Ground, directory: Path) -> AsyncIterator["Prison"]:
        """With an empty stream, a service that answers, and both coordinators connected."""
        async with (
            ground.nats() as witness,
            ground.bus("storage") as storage,
            problem(ground, other := new_id(), directory) as (_, neighbour),
        ):
            prison = cls(ground, witness, new_id(), other)
            await ensure_stream(witness.jetstream())
            await storage.answer({subjects.runtime("*", "presign"): prison._answer})
            await witness.subscribe(">", cb=prison._hear)
            await arrived(witness)
            async with problem(ground, prison.mine, directory) as (minted, inside):
                prison.minted, prison.inside, prison.neighbour = minted, inside, neighbour
                yield prison

    async def _answer(self, subject: str, body: bytes) -> bytes:
        self.asked.append((subject, body))
        return b"answer"

    async def _hear(self, message: Msg) -> None:
        self.heard.append(message.subject)
        if message.reply.startswith("_R_."):
            self.answers.add(message.reply)

    @property
    def own(self) -> str:
        """The one request that is answered."""
        return subjects.runtime(self.mine, "presign")

    async def settled(self) -> None:
        """Everything that was sent until now has arrived wherever it was going to."""
        await arrived(self.inside.client)
        assert (await self.inside.client.request(self.own, b"last", timeout=5)).data == b"answer"
        await arrived(self._witness)

    async def foreign(self, chosen: str = "") -> list[str]:
        """What the witness heard that is neither the problem's own request nor the way of its answer.

        That way is the server's to name: where the problem has `chosen` one, it is none.
        """
        await self.settled()
        own = {subjects.runtime(self.mine, verb) for verb in VERBS} | self.answers - {chosen}
        return [subject for subject in self.heard if subject not in own]

    async def is_cut_off(self) -> bool:
        """Whether its connection has ended: nats-py gives up one that was told anything but a refusal."""
        return self.inside.client.is_closed

    async def platform_answers(self) -> None:
        """Whoever else there is, they are served."""
        answered = await self.neighbour.client.request(subjects.runtime(self.other, "presign"), b"", timeout=5)
        assert answered.data == b"answer"

    async def stream_is_untouched(self) -> None:
        """No message in it, no consumer, no other stream, and the configuration that the relay made."""
        js = self._witness.jetstream()
        info = await js.stream_info(subjects.STREAM)
        assert (info.state.last_seq, info.state.consumer_count) == (0, 0)
        assert [stream.config.name for stream in await js.streams_info()] == [subjects.STREAM]


@pytest.fixture
async def prison(bare: Ground, tmp_path: Path) -> AsyncIterator[Prison]:
    """A problem's account, and all around it."""
    async with Prison.open(bare, tmp_path) as made:
        yield made


def everything_else(prison: Prison) -> list[str]:
    """Each subject that anybody on the platform, or the server itself, has an ear for; but for the problem's own."""
    listened = [subject for permissions in PERMISSIONS.values() for subject in permissions.subscribe]
    said = [subject for permissions in PERMISSIONS.values() for subject in permissions.publish]
    concrete = [subject.replace("*", "x").replace(">", "x.y") for subject in (*listened, *said)]
    return [
        *dict.fromkeys(concrete),
        *(subjects.runtime(prison.other, verb) for verb in VERBS),
        *(f"fedota.runtime.{name}.report" for name in ("*", ">", "", f"{prison.mine}.x", f"{prison.mine[:-1]}")),
        f"fedota.runtime.{prison.mine}",
        f"fedota.runtime.{prison.mine}.report.more",
        f"fedota.runtime.{prison.mine.upper()}.report",
        subjects.event("RoundUpdated", prison.mine),
        "$JS.API.INFO",
        "$JS.API.STREAM.CREATE.MINE",
        "$JS.API.STREAM.LIST",
        *(f"$JS.API.STREAM.{verb}.{subjects.STREAM}" for verb in STREAM_VERBS),
        f"$JS.API.CONSUMER.CREATE.{subjects.STREAM}",
        f"$JS.API.CONSUMER.CREATE.{subjects.STREAM}.mine.fedota.events.>",
        f"$JS.API.DIRECT.GET.{subjects.STREAM}.fedota.events.x.y",
        f"$JS.ACK.{subjects.STREAM}.gateway.1.1.1.1.1",
        f"$JS.FC.{subjects.STREAM}.gateway.x",
        "$JS.EVENT.ADVISORY.x",
        "$SYS.REQ.USER.INFO",
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.SERVER.PING.CONNZ",
        "$SYS.REQ.ACCOUNT.PING.CONNZ",
        "$SYS.REQ.CLAIMS.PACK",
        "$SYS.REQ.CLAIMS.LIST",
        "$SYS.REQ.CLAIMS.DELETE",
        f"$SYS.REQ.ACCOUNT.{prison.minted.account}.CLAIMS.LOOKUP",
        f"$SYS.ACCOUNT.{prison.minted.account}.CLAIMS.UPDATE",
        "$SYS._INBOX.x",
        "$KV.bucket.key",
        "$O.store.C.x",
        "_R_.x",
        "_GR_.x.y",
        "_INBOX.x",
    ]


async def test_it_is_refused_every_subject_but_its_own(prison: Prison) -> None:
    """To publish to, and, but for its own inbox, to listen to; not one word of it arrives."""
    publish = [subject for subject in everything_else(prison) if subject and ".." not in subject]
    subscribe = [
        *dict.fromkeys(subject for one in PERMISSIONS.values() for subject in (*one.subscribe, *one.publish)),
        *(">", "*.>", "_INBOX_>", "_R_.>", "$SYS.>", "$JS.>", "$SRV.PING", "fedota.>", subjects.EVENTS),
        subjects.runtime("*", "*"),
        subjects.runtime(prison.mine, "*"),
    ]
    subscribe = [one for one in subscribe if one not in ("_INBOX_>", "_INBOX.>")]
    assert await prison.inside.refused(publish, subscribe) == {*publish, *subscribe}
    assert await prison.foreign() == []
    await prison.stream_is_untouched()


async def test_a_queue_is_no_way_around(prison: Prison) -> None:
    """Permissions for queue groups are separate in NATS: those of the platform's services cannot be joined."""
    before = len(prison.inside.errors)
    wanted = [(subjects.runtime("*", "presign"), "q"), (subjects.command("problems", "*"), "q"), (subjects.EVENTS, "x")]
    for subject, queue in wanted:
        await prison.inside.client.subscribe(subject, queue=queue)
    await prison.settled()
    refused = [
        error for error in prison.inside.errors[before:] if "permissions violation for subscription" in error.lower()
    ]
    assert len(refused) == len(wanted)
    assert prison.asked == [(prison.own, b"last")]


REPLIES: Final[dict[str, Callable[[Prison], str]]] = {
    "the stream's events": lambda prison: subjects.event("RoundUpdated", prison.mine),
    "the inlet by a wildcard": lambda _: subjects.inlet("*").replace(">", "RoundUpdated.x"),
    "another problem's request": lambda prison: subjects.runtime(prison.other, "report"),
    "its own request, so that it goes round": lambda prison: subjects.runtime(prison.mine, "report"),
    "a command": lambda _: subjects.command("problems", "StopProblem"),
    "an operator's question": lambda _: subjects.operation("gateway", "rebuild"),
    "a service's inbox": lambda _: "_INBOX_rounds.x.y",
    "an acknowledgement": lambda _: f"$JS.ACK.{subjects.STREAM}.gateway.1.1.1.1.1",
    "the deletion of the stream": lambda _: f"$JS.API.STREAM.DELETE.{subjects.STREAM}",
    "the next message of a consumer": lambda _: f"$JS.API.CONSUMER.MSG.NEXT.{subjects.STREAM}.gateway",
    "the server's accounts": lambda _: "$SYS.REQ.CLAIMS.UPDATE",
    "a mapped reply": lambda _: "_R_.x",
}


@pytest.mark.parametrize("name", REPLIES)
async def test_the_reply_of_a_request_goes_nowhere_else(prison: Prison, name: str) -> None:
    """A permission to publish does not cover where a reply is sent: it stays in the problem's account all the same."""
    reply = REPLIES[name](prison)
    for verb in VERBS:
        await prison.inside.client.publish(subjects.runtime(prison.mine, verb), b"body", reply=reply)
    assert await prison.foreign(reply) == []
    assert reply not in prison.answers
    await prison.stream_is_untouched()


HEADERS: Final[dict[str, dict[str, str]]] = {
    "deduplication": {"Nats-Msg-Id": "x"},
    "a roll-up": {"Nats-Rollup": "all"},
    "an expected sequence": {"Nats-Expected-Last-Sequence": "0", "Nats-Expected-Stream": subjects.STREAM},
    "a batch": {"Nats-Batch-Id": "x", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
    "a schedule": {"Nats-Schedule": "@at 2026-01-01T00:00:00Z", "Nats-Schedule-Target": "fedota.events.x.y"},
    "a time to live": {"Nats-TTL": "1"},
    "a purge": {"Nats-Marker-Reason": "Purge", "KV-Operation": "PURGE"},
    "a trace": {"Nats-Trace-Dest": "fedota.events.RoundUpdated.x"},
    "a trace alone": {"Nats-Trace-Dest": "fedota.commands.problems.StopProblem", "Nats-Trace-Only": "1"},
    "a trace to the inlet": {"Nats-Trace-Dest": "fedota.relay.x.y"},
    "a distributed trace": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    "somebody else's name": {"Nats-Request-Info": '{"acc":"platform","user":"rounds"}'},
    "a source": {"Nats-Stream-Source": f"{subjects.STREAM} 1 > > fedota.events.x"},
}


@pytest.mark.parametrize("name", HEADERS)
async def test_headers_make_the_server_do_nothing(prison: Prison, name: str) -> None:
    """JetStream and the server itself act on some of them: none of it reaches past the request that carries them."""
    for verb, reply in product(VERBS, ("", subjects.event("RoundUpdated", prison.mine))):
        subject = subjects.runtime(prison.mine, verb)
        await prison.inside.client.publish(subject, b"body", reply=reply, headers=HEADERS[name])
    assert await prison.foreign() == []
    await prison.stream_is_untouched()


async def test_neighbours_hear_nothing_of_each_other(prison: Prison) -> None:
    """Neither requests nor answers, by the widest subscription that is granted, nor by guessing an inbox."""
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    await prison.neighbour.client.subscribe("_INBOX.>", cb=hear)
    await arrived(prison.neighbour.client)
    heard.clear()
    inbox = prison.inside.client.new_inbox()
    await prison.inside.client.subscribe(inbox)
    await prison.inside.client.publish(prison.own, b"body", reply=inbox)
    await prison.settled()
    await prison.neighbour.client.publish(inbox, b"forged")
    await arrived(prison.neighbour.client)
    assert [subject for subject in heard if subject == inbox] == []
    assert any("permissions violation" in error.lower() for error in prison.neighbour.errors)


async def test_its_connections_and_subscriptions_are_counted(prison: Prison, tmp_path: Path) -> None:
    """Who took a coordinator over cannot fill the server: the platform is still answered."""
    path = tmp_path / f"{prison.mine}.creds"
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(_CONNECTIONS - 1):
            await stack.enter_async_context(Person.connect(prison.ground.servers.nats_url, path, "_INBOX"))
        assert not await is_let_in(prison.ground.servers.nats_url, path)
    for number in range(_SUBSCRIPTIONS // 2):
        await prison.inside.client.subscribe(f"_INBOX.{number}")
    await arrived(prison.inside.client)
    for number in range(_SUBSCRIPTIONS):
        await prison.inside.client.subscribe(f"_INBOX.more.{number}")
    await until(prison.is_cut_off, "the subscriptions beyond the limit are refused")
    assert str(prison.inside.client.last_error) == "nats: maximum subscriptions exceeded"
    await prison.platform_answers()


def _unsigned(minted: Minted) -> tuple[dict[str, Any], str, str]:
    """The claims of a user's credentials, its JWT and its seed."""
    lines = minted.credentials.splitlines()
    jwt, seed = lines[1], lines[5]
    body = jwt.split(".")[1]
    return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))), jwt, seed


def _credentials(jwt: str, seed: str) -> str:
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


async def test_its_credentials_cannot_be_widened(prison: Prison, tmp_path: Path) -> None:
    """Whatever is changed in them, or signed with the key that they hold: nobody is let in with it."""
    claims, jwt, seed = _unsigned(prison.minted)
    user = nkeys.from_seed(seed.encode())
    everything = {**claims["nats"], "pub": {"allow": [">"]}, "sub": {"allow": [">"]}}
    head, _, signature = jwt.split(".")
    changed = base64.urlsafe_b64encode(msgspec.json.encode({**claims, "nats": everything})).rstrip(b"=").decode()
    platform = prison.ground.servers.platform_account
    stranger = AccountKeys(_account_seed())
    forged = {
        "with other claims under the old signature": _credentials(f"{head}.{changed}.{signature}", seed),
        "without a signature": _credentials(f"{head}.{changed}.", seed),
        "signed by the user itself": _credentials(_sign(user, claims["sub"], "x", everything), seed),
        "as a user of the platform's account": _credentials(
            _sign(user, claims["sub"], "x", {**everything, "issuer_account": platform}), seed
        ),
        "signed by an account that nobody knows": stranger.credentials("x", Permissions([">"], [">"])),
        "with the algorithm none": _credentials(
            base64.urlsafe_b64encode(b'{"typ":"JWT","alg":"none"}').rstrip(b"=").decode() + f".{changed}.", seed
        ),
    }
    for name, text in forged.items():
        path = tmp_path / "forged.creds"
        write_private(path, text.encode())
        assert not await is_let_in(prison.ground.servers.nats_url, path), name
    assert await is_let_in(prison.ground.servers.nats_url, tmp_path / f"{prison.mine}.creds")


def _account_seed() -> str:
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT)
    return seed.decode()
