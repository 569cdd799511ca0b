"""NATS and an object store that are there to be killed: one pair for all the runs of a session."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats

from fedota.kernel.nats_accounts import Operator, push_account
from fedota.kernel.settings import Secret
from fedota.local.nats_server import NatsAccess, nats_server
from fedota.local.seaweedfs import S3Access, forget_sockets, seaweedfs
from fedota.local.state import DataDirectory
from services.storage.blobs import Blobs
from services.storage.settings import Settings
from tests.faults.servers import Server
from tests.support.waiting import until


class Around:
    """The servers around a problem's coordinator and selectors."""

    def __init__(self, nats_: Server, access: NatsAccess, s3: Server, s3_access: S3Access) -> None:
        self.nats = nats_
        self.access = access
        self.s3 = s3
        self._s3_access = s3_access

    @classmethod
    @asynccontextmanager
    async def up(cls, directory: Path) -> AsyncIterator["Around"]:
        """Both answering, with a bucket."""
        data = DataDirectory(directory)
        bus, access = nats_server(data)
        store, s3_access = seaweedfs(data)
        around = cls(Server(bus, bus.directory / "jetstream"), access, Server(store, store.directory), s3_access)
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(around.nats.up())
                await stack.enter_async_context(around.s3.up())
                await around._make_bucket()
                yield around
                await around.s3.kill()  # it would take its time to stop
        finally:
            forget_sockets(data)

    @property
    def s3_url(self) -> str:
        """Where the object store answers."""
        return self._s3_access.url

    async def _make_bucket(self) -> None:
        async with self.blobs() as blobs:

            async def made() -> bool:
                await blobs.create_bucket()
                return True

            await until(made, "there is a bucket")

    @asynccontextmanager
    async def blobs(self, seen_at: str = "") -> AsyncIterator[Blobs]:
        """The bucket; URLs are signed for a store that is `seen_at` some other address."""
        access = self._s3_access
        settings = Settings(
            database_url=Secret("postgresql://nobody@nowhere/none"),
            nats_url=self.access.url,
            s3_url=access.url,
            s3_public_url=seen_at,
            s3_access_key=Secret(access.access_key),
            s3_secret_key=Secret(access.secret_key),
            s3_bucket=access.bucket,
            s3_region=access.region,
        )
        threads = ThreadPoolExecutor(2)
        try:
            yield Blobs(settings, threads)
        finally:
            threads.shutdown()

    async def account(self, problem_id: str, path: Path) -> Path:
        """Credentials of the problem's own account, written to `path`."""
        assert self.access.operator is not None
        operator = Operator.read(self.access.operator)
        minted = operator.problem_account(problem_id, platform=self.access.platform_account)
        key = str(self.access.keys["system"])
        system = await nats.connect(self.access.url, user_credentials=key, inbox_prefix=b"_INBOX_system")
        try:
            await push_account(system, minted.jwt)
        finally:
            await system.close()
        path.write_text(minted.credentials)
        return path
