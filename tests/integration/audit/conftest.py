"""A log, a notary and an auditor on real servers, and a superuser who does what nobody may."""

import asyncio
import importlib.util
import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from minio import Minio

from fedota.audit import export, verification
from fedota.audit.chain import GENESIS, digest
from fedota.audit.notary import Notary
from fedota.audit.reading import StoredLog
from fedota.audit.settings import NotarySettings
from fedota.audit.store import FOLDER, Bucket, Checkpoints, Place, file_name
from fedota.audit.verification import Report
from fedota.events import EventData, NewEvent, uuid7
from fedota.kernel.database import Connection, Pool, connect_pool
from fedota.kernel.event_log import Append, Context
from fedota.kernel.files import write_private
from fedota.kernel.migrations import PROCESSES, migrate
from fedota.kernel.settings import Secret
from fedota.local.seaweedfs import S3Access
from tests.contract.ground import Ground, created, requested
from tests.support.objects import content, opened
from tests.support.servers import RunningServers, fresh_database
from tests.support.services import PASSWORD, new_id

SCRIPT: Final = Path(__file__).parents[3] / "docs" / "verify_audit.py"


def place(access: S3Access, url: str | None = None) -> Place:
    """The bucket of an identity, perhaps through a door."""
    return Place(url or access.url, access.bucket, Secret(access.access_key), Secret(access.secret_key))


def ignore(_done: int, _all: int) -> None:
    """Nobody watches."""


def public_pem(key: Ed25519PrivateKey) -> bytes:
    """The file of its public key."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class World:
    """The log of a platform without processes; its notary signs when it is told to."""

    def __init__(self, ground: Ground, directory: Path, pool: Pool, bucket: Bucket, store: Minio) -> None:
        self.ground = ground
        self.directory = directory
        self.bucket = bucket
        self.store = store
        self.log = StoredLog(pool)
        self.key = Ed25519PrivateKey.generate()
        self.key_file, self.public_key_file = directory / "notary.pem", directory / "notary.public.pem"
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(self.key_file, pem)
        self.public_key_file.write_bytes(public_pem(self.key))
        self.notary = self.another_notary()

    def another_notary(self, bucket: Bucket | None = None, memory: Path | None = None) -> Notary:
        """One that has the same key."""
        return Notary(self.log, bucket or self.bucket, self.key, every=0.05, memory=memory)

    def settings(self, **more: Any) -> NotarySettings:
        """Those of a notary here."""
        access = self.ground.servers.s3_audit["notary"]
        given: dict[str, Any] = {
            "database_url": self.ground.role_url("notary"),
            "key_file": self.key_file,
            "s3_url": access.url,
            "s3_audit_bucket": access.bucket,
            "s3_audit_access_key": Secret(access.access_key),
            "s3_audit_secret_key": Secret(access.secret_key),
            "every_seconds": 0.05,
        }
        return NotarySettings(**{**given, **more})

    async def append(self, *events: EventData) -> None:
        """Each in a transaction of its own, with all that an event may have."""
        for data in events:
            context = Context(actor="ä: setter", correlation=uuid7(), causation=uuid7(), traceparent="00-ab-cd-01")
            subject = f"problems/{data.problem_id}"
            await self.ground.logs["problems"].append(
                Append(subject=subject, events=[NewEvent(data=data)], context=context)
            )

    async def grow(self, count: int) -> None:
        """So many events more, in streams of three."""
        for number in range(count):
            if number % 3 == 0:
                problem_id = new_id()
            await self.append(requested(problem_id, f"Spital Zürich {number}") if number % 3 else created(problem_id))

    async def story(self) -> None:
        """Thirty events; checkpoints 1 to 4 at positions 0, 10, 20 and 25."""
        await self.notary.sign()
        for count in (10, 10, 5):
            await self.grow(count)
            await self.notary.sign()
        await self.grow(5)

    @asynccontextmanager
    async def tampered(self) -> AsyncIterator["Tampered"]:
        """The log as a superuser may change it, who has shut off what keeps it append-only; undone afterwards."""
        async with self.ground.superuser() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(
                "alter table fedota.events drop constraint events_position, drop constraint events_time"
            )
            seen_before, tampered = self.log, Tampered(connection)
            self.log = StoredLog(tampered)  # type: ignore[arg-type] # it fetches as a pool does
            try:
                yield tampered
            finally:
                self.log = seen_before
                await transaction.rollback()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards all checkpoints are as they were."""
        files = {number: self.checkpoint(number) for number in self.numbers()}
        try:
            yield
        finally:
            for number, file in files.items():
                self.plant(number, file)

    async def verify(self, *, checkpoints: Checkpoints | None = None, key: Ed25519PrivateKey | None = None) -> Report:
        """What `fedota audit verify` finds."""
        public_key = (key or self.key).public_key()
        return await verification.verify(self.log, checkpoints or self.bucket, public_key, ignore)

    async def export(self, until: int | None = None) -> Path:
        """What `fedota audit export` writes."""
        path = self.directory / "export.ndjson"
        with path.open("wb") as file:
            await export.export(self.log, self.bucket, self.key.public_key(), file, until, ignore)
        return path

    def plant(self, number: int, body: bytes) -> None:
        """Put a checkpoint where one may be already."""
        self.store.put_object(self.bucket_name, FOLDER + file_name(number), io.BytesIO(body), len(body))

    def remove(self, number: int) -> None:
        """Delete a checkpoint."""
        self.store.remove_object(self.bucket_name, FOLDER + file_name(number))

    def checkpoint(self, number: int) -> bytes:
        """A checkpoint's file."""
        return content(self.store, self.bucket_name, FOLDER + file_name(number))

    def numbers(self) -> list[int]:
        """Which checkpoints there are."""
        names = [str(item.object_name) for item in self.store.list_objects(self.bucket_name, FOLDER, recursive=True)]
        return sorted(int(name.removeprefix(FOLDER).removesuffix(".txt")) for name in names)

    @property
    def bucket_name(self) -> str:
        """The bucket for checkpoints."""
        return self.ground.servers.s3_audit["notary"].bucket


class Tampered:
    """A superuser's transaction, in which one statement at a time is done."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def execute(self, statement: str, *arguments: object) -> None:
        """Change something, past the guard: that is in its place again afterwards, as who is careful would do it."""
        async with self._turn:
            await self._connection.execute("alter table fedota.events disable trigger append_only")
            await self._connection.execute(statement, *arguments)
            await self._connection.execute("alter table fedota.events enable always trigger append_only")

    async def fetch(self, query: str, *arguments: object) -> list[Any]:
        """All rows."""
        async with self._turn:
            return await self._connection.fetch(query, *arguments)

    async def fetchrow(self, query: str, *arguments: object, timeout: float | None = None) -> Any:
        """The first row."""
        async with self._turn:
            return await self._connection.fetchrow(query, *arguments, timeout=timeout)

    async def fetchval(self, query: str, *arguments: object, timeout: float | None = None) -> Any:
        """The first value of the first row."""
        async with self._turn:
            return await self._connection.fetchval(query, *arguments, timeout=timeout)

    async def chain_anew(self, first: int) -> None:
        """Compute all hashes from a position on, and the head, as who knows the formula."""
        last: int = await self.fetchval("select max(position) from fedota.events")
        before = await self.fetchval("select hash from fedota.events where position = $1", first - 1) or GENESIS
        reading = StoredLog(self)  # type: ignore[arg-type] # it fetches as a pool does
        async for page in reading.pages(first - 1, last):
            for record in page:
                before = digest(record, before)
                await self.execute("update fedota.events set hash = $2 where position = $1", record.position, before)
        await self.execute("update fedota.head set position = $1, hash = $2", last, before)


@pytest.fixture
def script() -> Callable[[Path, Path | None], None]:
    """`verify` of the script that needs nothing of Fedota."""
    specification = importlib.util.spec_from_file_location("verify_audit", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    verify: Callable[[Path, Path | None], None] = module.verify
    return verify


@contextmanager
def _empty_bucket(access: S3Access) -> Iterator[Minio]:
    """The bucket for checkpoints, without those of the test before."""
    with opened(access) as store:
        if store.bucket_exists(access.bucket):
            for item in store.list_objects(access.bucket, recursive=True):
                store.remove_object(access.bucket, str(item.object_name))
        else:
            store.make_bucket(access.bucket)
        yield store


@asynccontextmanager
async def _world(servers: RunningServers, directory: Path) -> AsyncIterator[World]:
    async with fresh_database(servers.admin_url) as database_url, AsyncExitStack() as stack:
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
        ground, access = Ground(servers, database_url), servers.s3_audit["notary"]
        ground.logs["problems"] = await stack.enter_async_context(ground.log("problems"))
        pool = await stack.enter_async_context(connect_pool(ground.role_url("auditor"), "auditor", size=2))
        store = stack.enter_context(_empty_bucket(access))
        bucket = stack.enter_context(Bucket.open(place(access)))
        yield World(ground, directory, pool, bucket, store)


@pytest.fixture
async def world(servers: RunningServers, tmp_path: Path) -> AsyncIterator[World]:
    """An empty log and no checkpoint."""
    async with _world(servers, tmp_path) as world:
        yield world


@pytest.fixture(scope="module")
async def told(servers: RunningServers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A log with a story and checkpoints, for all tests of a module: each leaves it as it was."""
    async with _world(servers, tmp_path_factory.mktemp("told")) as world:
        await world.story()
        yield world
