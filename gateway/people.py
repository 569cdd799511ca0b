"""The people behind actors: outside the gateway each is an id and a sealed name, which only a key kept here opens.

Whatever leaves the gateway for services, NATS, the log or a read model names a person as `<standing>~<id>~<sealed>`:
`setter` or `organization:Clinic A`, then which person, then its name under AES-SIV (RFC 5297). That is deterministic,
so one person is one actor: idempotency keys and filters work as they do for a role. Each person has a key of its own,
wrapped under the gateway's key file, in the schema `people`. Deleting it forgets the person: the events stay as they
are, byte for byte, and nobody can read the name in them any more.

Nothing is remembered between two questions, so forgetting holds at once, whichever gateway was asked for it.
"""

import asyncio
import base64
import hmac
import re
import secrets
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Final

import asyncpg
import msgspec
import structlog
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.kernel.database import Pool
from fedota.kernel.event_log import is_outage
from fedota.kernel.settings import SettingsError
from gateway.web_errors import Handler

FORGOTTEN: Final = "a forgotten person"
UNREADABLE: Final = "a person whose name cannot be opened"
_STANDING: Final = r"(?P<standing>(?:setter|organization|operator)(?::[A-Za-z0-9 ._-]+)?)"
_ACTOR: Final = _STANDING + r"~(?P<id>[0-9a-f]{32})~(?P<sealed>[\w-]+)"
_WHOLE: Final = re.compile(_ACTOR, re.ASCII)
# Inside a JSON string each quote has a backslash before it: this finds fields, and never text that looks like one.
_IN_JSON: Final = re.compile(rb'(?P<field>"(?:actor|setter|dropped_by)":")' + _ACTOR.encode() + rb'(?=")', re.ASCII)
_IN_HTML: Final = re.compile(rb"(?P<field>\b)" + _ACTOR.encode(), re.ASCII)
_PERSON: Final = re.compile("[0-9a-f]{32}")
_BLOCK: Final = 32  # bytes: a sealed name tells its length no closer than that
_FIND: Final = """
select person, digest, key, array(select actor from people.actors a where a.person = k.person) as actors
from people.keys k where digest = $1 or person = $2
"""
_PROOF: Final = "select proof from people.key_file"
_PROVE: Final = "insert into people.key_file (proof) values ($1) on conflict do nothing"
_ADD: Final = "insert into people.keys (person, digest, key, sealed) values ($1, $2, $3, $4) on conflict do nothing"
_NOTE: Final = "insert into people.actors (actor, person) values ($1, $2) on conflict do nothing"
_log = structlog.get_logger(__name__)


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody whose name can be opened: `id` stands for it in every event."""

    id: str
    name: str


class Forgotten(msgspec.Struct, frozen=True, kw_only=True):
    """What forgetting did, and what remains. `forgotten` is false when there was nobody to forget, or not any more."""

    forgotten: bool
    remains: str


class PeopleKeys:
    """What follows from the key file: digests to find people by, and wrapped keys of people."""

    def __init__(self, secret: bytes) -> None:
        self._find = _derived(secret, b"find", 32)
        self._wrap = AESSIV(_derived(secret, b"wrap", 64))

    @property
    def proof(self) -> bytes:
        """What only this key file gives."""
        return hmac.digest(self._find, b"\0the key file", "sha256")  # no name begins with U+0000

    def digest(self, name: str) -> bytes:
        """What a person is found by."""
        return hmac.digest(self._find, _plain(name), "sha256")

    def new(self, person: str) -> tuple[AESSIV, bytes]:
        """A key for a person, and the same wrapped."""
        key = AESSIV.generate_key(512)
        return AESSIV(key), self._wrap.encrypt(key, [person.encode()])

    def unwrap(self, person: str, key: bytes) -> AESSIV:
        """A person's key. Raises `InvalidTag` when it was wrapped for another one, or not here."""
        return AESSIV(self._wrap.decrypt(key, [person.encode()]))


def _derived(secret: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=b"fedota people: " + purpose).derive(secret)


def _plain(name: str) -> bytes:
    """One form for what reads the same."""
    return unicodedata.normalize("NFC", name).encode()


def _seal(key: AESSIV, person: str, name: str) -> str:
    plain = _plain(name)
    padded = plain.ljust(-(-len(plain) // _BLOCK) * _BLOCK, b"\0")
    return base64.urlsafe_b64encode(key.encrypt(padded, [person.encode()])).decode().rstrip("=")


def _open(key: AESSIV, person: str, sealed: str) -> str:
    """The name. Raises `InvalidTag` unless it was sealed with this key, for this person."""
    try:
        data = base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4))
        return key.decrypt(data, [person.encode()]).rstrip(b"\0").decode()
    except ValueError:  # too short, or no base64
        raise InvalidTag from None


def read_key_file(path: Path | None, needed: bool) -> PeopleKeys | None:
    """The keys that the file gives. `needed`: a token names a person. Raises `SettingsError`, which says what to do."""
    if path is None:
        if needed:
            raise SettingsError(
                "A token names a person, but people_key_file is not set: names leave the gateway sealed only. Make a "
                "file for the gateway alone (umask 077; openssl rand -hex 32 > people.key), set people_key_file to "
                "it, and keep it: without it nobody can read the names."
            )
        return None
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"Others may read the key file {path}. Run: chmod 600 {path}")
        secret = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(
            f"The key file {path} cannot be read: {error.strerror}. Put it back, or set people_key_file."
        ) from None
    if len(secret) < 32:
        raise SettingsError(f"The key file {path} holds fewer than 32 bytes. Fill it with: openssl rand -hex 32")
    return PeopleKeys(secret)


def _require_proof(proof: bytes | None, keys: PeopleKeys | None) -> None:
    """Names that are sealed under two files could never be told apart, or found, again."""
    if proof is None or (keys and hmac.compare_digest(proof, keys.proof)):
        return
    raise SettingsError(
        f"The key file that people's names are sealed under is {'another one' if keys else 'not given'}. Set "
        "people_key_file to the file that this platform has had from the beginning. If it is lost for good, so are the "
        "names: then have the database's administrator run `truncate people.keys, people.actors, people.key_file`, and "
        "start again with a new file."
    )


class People:
    """Names sealed on their way out, and opened on their way to those who may see them."""

    def __init__(self, pool: Pool, keys: PeopleKeys | None) -> None:
        self._pool = pool
        self._keys = keys
        self._asked: set[str] = set()
        self._answer: asyncio.Task[Mapping[str, AESSIV | None]] | None = None

    @classmethod
    async def open(cls, pool: Pool, keys: PeopleKeys | None) -> "People":
        """The people of this platform. Raises `SettingsError` when their keys are wrapped under another key file."""
        _require_proof(await pool.fetchval(_PROOF), keys)
        return cls(pool, keys)

    async def actor(self, standing: str, name: str | None) -> str:
        """How everybody but the gateway knows who acts; the same text whenever the same person acts in this standing.

        `standing` is a role, and the organization that it is for.
        """
        if name is None:
            return standing
        keys = self._require_keys()
        with _database_needed():
            row = await self._find_or_add(keys, name)
            person = row["person"]
            actor = f"{standing}~{person}~{_seal(keys.unwrap(person, row['key']), person, name)}"
            if actor not in row["actors"]:
                with suppress(asyncpg.ForeignKeyViolationError):  # forgotten a moment ago
                    await self._pool.execute(_NOTE, actor, person)
        return actor

    async def actors_of(self, who: str) -> list[str]:
        """Every actor that a person has been, by its name or id; none when nobody is known by that, or not any more."""
        with _database_needed():
            row = await self._find(who)
        return sorted(row["actors"]) if row else []

    async def shown(self, actor: str) -> str:
        """An actor as people see it: a person by name, and in which standing."""
        if not (match := _WHOLE.fullmatch(actor)):
            return actor
        keys = await self._keys_of({match["id"]})
        return _shown(match["standing"], match["id"], match["sealed"], keys)

    async def in_json(self, body: bytes) -> bytes:
        """The same JSON with the actors in it as people see them, in the fields that hold actors."""
        return await self._in(body, _IN_JSON, lambda text: to_json(text)[1:-1])

    async def in_html(self, body: bytes) -> bytes:
        """The same page with the actors on it as people see them."""
        return await self._in(body, _IN_HTML, lambda text: escape(text).encode())

    async def listed(self) -> list[Person]:
        """Everybody whose name can be opened, who has acted first first."""
        with _database_needed():
            rows = await self._pool.fetch("select person, key, sealed from people.keys order by since, person")
        return [
            Person(id=row["person"], name=_opened(row["person"], row["sealed"], self._unwrapped(row))) for row in rows
        ]

    async def forget(self, who: str, *, by: str, named: Collection[str]) -> Forgotten:
        """Delete a person's key, by name or id: from now on nobody can open the name. Twice is as good as once.

        `by` is the actor who asked for it. `named` are the names of those who hold a token: raises `person_named` for
        one of them.
        """
        with _database_needed():
            row = await self._find(who)
            self._require_not_named(who, row, named)
            person = row and await self._pool.fetchval(
                "delete from people.keys where person = $1 returning person", row["person"]
            )
        if person is None:
            _log.info("nobody to forget", by=by)
            remains = "Nobody is known by this name or id. Who was forgotten before is not known any more."
            return Forgotten(forgotten=False, remains=remains)
        _log.info("person forgotten", person=person, by=by)
        return Forgotten(
            forgotten=True,
            remains=f"Events keep the id {person} and a sealed name that nobody can open any more. Backups of the "
            "database from before now still hold its key: after restoring one, forget this person again. Whoever acts "
            "with a token for this name later begins a new id.",
        )

    def _require_not_named(self, who: str, row: asyncpg.Record | None, named: Collection[str]) -> None:
        if self._keys is None:
            return
        wanted = {self._keys.digest(who), row and row["digest"]}
        if any(self._keys.digest(name) in wanted for name in named):
            raise FedotaError(
                "person_named",
                "A token in the tokens file still names this person, who would be known again as soon as it is used. "
                "Take that entry out of the file, then forget the person: the gateway need not start again.",
            )

    def _require_keys(self) -> PeopleKeys:
        if self._keys is None:
            raise SettingsError("people_key_file is not set: no person's name can be sealed.")
        return self._keys

    async def _find(self, who: str) -> asyncpg.Record | None:
        if self._keys is None:
            return None
        person = who if _PERSON.fullmatch(who) else None
        return await self._pool.fetchrow(_FIND, self._keys.digest(who), person)

    async def _find_or_add(self, keys: PeopleKeys, name: str) -> asyncpg.Record:
        """The person's row, made now if it has none; of two gateways that make it at once, one row counts for both."""
        while True:
            row = await self._pool.fetchrow(_FIND, keys.digest(name), None)
            if row is not None:
                return row
            person = secrets.token_hex(16)
            key, wrapped = keys.new(person)
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(_PROVE, keys.proof)  # the first one's file is everybody's
                _require_proof(await connection.fetchval(_PROOF), keys)
                await connection.execute(_ADD, person, keys.digest(name), wrapped, _seal(key, person, name))

    async def _in(self, body: bytes, pattern: re.Pattern[bytes], written: Callable[[str], bytes]) -> bytes:
        if b"~" not in body:
            return body
        people = {match["id"].decode() for match in pattern.finditer(body)}
        if not people:
            return body
        keys = await self._keys_of(people)

        def opened(match: re.Match[bytes]) -> bytes:
            standing, person, sealed = (match[name].decode() for name in ("standing", "id", "sealed"))
            return match["field"] + written(_shown(standing, person, sealed, keys))

        return pattern.sub(opened, body)

    async def _keys_of(self, people: set[str]) -> Mapping[str, AESSIV | None]:
        """The keys of those who are not forgotten now; None for one that cannot be unwrapped.

        Thousands of streams show an event in the same moment: those who ask in it share one query, begun after they
        asked.
        """
        self._asked |= people
        if self._answer is None:
            self._answer = asyncio.create_task(self._look())
        return await asyncio.shield(self._answer)

    async def _look(self) -> Mapping[str, AESSIV | None]:
        await asyncio.sleep(0)
        asked, self._asked, self._answer = list(self._asked), set(), None
        with _database_needed():
            rows = await self._pool.fetch("select person, key from people.keys where person = any($1)", asked)
        return {row["person"]: self._unwrapped(row) for row in rows}

    def _unwrapped(self, row: asyncpg.Record) -> AESSIV | None:
        try:
            return self._keys.unwrap(row["person"], row["key"]) if self._keys else None
        except InvalidTag:
            _log.error("the key of a person is damaged", person=row["person"])
            return None


def _shown(standing: str, person: str, sealed: str, keys: Mapping[str, AESSIV | None]) -> str:
    name = _opened(person, sealed, keys[person]) if person in keys else FORGOTTEN
    return f"{name} ({standing})"


def _opened(person: str, sealed: str, key: AESSIV | None) -> str:
    try:
        return UNREADABLE if key is None else _open(key, person, sealed)
    except InvalidTag:
        _log.error("a sealed name is not what was sealed", person=person)
        return UNREADABLE


@contextmanager
def _database_needed() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_outage(error):
            raise
        words = "The names of people cannot be looked up now. Try again."
        raise FedotaError("unavailable", words, retry_after=2) from None


PEOPLE: Final = web.AppKey("people", People)


@web.middleware
async def named(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Open the names of people in whatever is answered to somebody who was let in."""
    response = await handler(request)
    if not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return response
    people = request.app[PEOPLE]
    match response.content_type:
        case "application/json":
            response.body = await people.in_json(response.body)
        case "text/html":
            response.body = await people.in_html(response.body)
    return response
