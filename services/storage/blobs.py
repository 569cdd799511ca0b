"""The object store: the one adapter to any S3.

The `minio` package asks and answers; it is synchronous, so it works in a few threads beside the event loop. Presigned
URLs are signed by `botocore`, because a PUT's headers have to be signed with it and minio cannot. Addresses are
path-style: a bucket needs no name of its own in the DNS.

A presigned PUT signs the exact length, the SHA-256 and `If-None-Match: *`: S3 takes those bytes and no others, once.
SeaweedFS holds all three. An S3 that ignores the checksum would not, so what counts is what `read` finds afterwards.
"""

import asyncio
import base64
import hashlib
import io
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import structlog
import urllib3
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from minio import Minio
from minio.error import MinioException, S3Error

from fedota.errors import FedotaError
from fedota.kernel.service import Service
from services.storage.domain import Seen
from services.storage.settings import Settings

_THREADS: Final = 8
_CHUNK: Final = 1024**2  # bytes of an object in memory at once
_TIMEOUT: Final = urllib3.Timeout(connect=2, read=30)
_RETRIES: Final = urllib3.Retry(total=2, backoff_factor=0.1)  # connections that were kept die with a restarted S3
_MISSING: Final = {"NoSuchKey", "NoSuchObject", "ResourceNotFound"}
_EXISTS: Final = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
_log = structlog.get_logger(__name__)

T = TypeVar("T")


class Blob(NamedTuple):
    """An object in a listing."""

    key: str
    modified: datetime


class Signed(NamedTuple):
    """A URL that is good for a while, and the headers that were signed with it and must be sent."""

    url: str
    headers: dict[str, str]


class Blobs:
    """The bucket. Every method raises `FedotaError("unavailable")` when S3 does not answer as it should."""

    def __init__(self, settings: Settings, threads: ThreadPoolExecutor) -> None:
        inside, access, secret = urlsplit(settings.s3_url), settings.s3_access_key, settings.s3_secret_key
        self._client = Minio(
            endpoint=inside.netloc,
            access_key=access.reveal(),
            secret_key=secret.reveal(),
            secure=inside.scheme == "https",
            region=settings.s3_region,
            http_client=urllib3.PoolManager(maxsize=_THREADS, timeout=_TIMEOUT, retries=_RETRIES),
        )
        self._bucket = settings.s3_bucket
        self._public = f"{(settings.s3_public_url or settings.s3_url).rstrip('/')}/{settings.s3_bucket}"
        credentials = Credentials(access.reveal(), secret.reveal())
        self._signer = S3SigV4QueryAuth(credentials, "s3", settings.s3_region, expires=settings.link_seconds)
        self._threads = threads

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, service: Service) -> AsyncIterator["Blobs"]:
        """The bucket, with its readiness in `service`; whether it is there yet only `check` tells."""
        # urllib3 warns of each retry with the path that it asked for
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        blobs = cls(settings, threads)
        service.add_check("s3", blobs.check)
        try:
            yield blobs
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    async def check(self) -> None:
        """Raise unless S3 answers and has the bucket."""
        if not await self._ask(self._client.bucket_exists, self._bucket):
            raise FedotaError("unavailable", "The object store has no bucket for us yet.")

    async def create_bucket(self) -> None:
        """Make the bucket, if it is not there."""
        await self._ask(self._create_bucket)

    async def size(self, key: str) -> int | None:
        """The object's size in bytes; None when there is none."""
        return await self._ask(self._size, key)

    async def read(self, key: str, *, keep: int = 0) -> Seen | None:
        """The whole object in a stream, of which the first `keep` bytes are kept; None when there is none."""
        return await self._ask(self._read, key, keep)

    async def put(self, key: str, body: bytes) -> None:
        """Write a small JSON object, over what was there."""
        put = partial(self._client.put_object, content_type="application/json")
        await self._ask(put, self._bucket, key, io.BytesIO(body), len(body))

    async def remove(self, key: str) -> None:
        """Remove the object; harmless when there is none."""
        await self._ask(self._client.remove_object, self._bucket, key)

    async def folders(self, prefix: str) -> list[str]:
        """The prefixes one level below `prefix`, each with its slash at the end."""
        return await self._ask(self._folders, prefix)

    async def below(self, prefix: str) -> list[Blob]:
        """Every object below `prefix`."""
        return await self._ask(self._below, prefix)

    def presign_get(self, key: str) -> Signed:
        """For who may read the object."""
        return self._presign("GET", key, {})

    def presign_put(self, key: str, *, size: int, sha256: str) -> Signed:
        """For who may write these very bytes, where there is nothing yet: 412 says that there is something."""
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {"Content-Length": str(size), "x-amz-checksum-sha256": checksum, "If-None-Match": "*"}
        return self._presign("PUT", key, headers)

    def _presign(self, method: str, key: str, headers: dict[str, str]) -> Signed:
        request = AWSRequest(method=method, url=f"{self._public}/{quote(key)}", headers=headers)
        self._signer.add_auth(request)
        return Signed(request.url, headers)

    async def _ask(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except S3Error as error:
            # its own text holds the object's place; the code says enough
            _log.warning("s3 refused", code=error.code)
            raise _unavailable(f"refused what we asked ({error.code})") from None
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            _log.warning("s3 failed", error=type(error).__name__)
            raise _unavailable("does not answer") from None

    def _create_bucket(self) -> None:
        try:
            if not self._client.bucket_exists(self._bucket):
                self._client.make_bucket(self._bucket)
        except S3Error as error:
            if error.code not in _EXISTS:  # another process of ours was faster
                raise

    def _size(self, key: str) -> int | None:
        try:
            return self._client.stat_object(self._bucket, key).size
        except S3Error as error:
            if error.code in _MISSING:
                return None
            raise

    def _read(self, key: str, keep: int) -> Seen | None:
        try:
            response = self._client.get_object(self._bucket, key)
        except S3Error as error:
            if error.code in _MISSING:
                return None
            raise
        digest, size, head = hashlib.sha256(), 0, bytearray()
        try:
            for chunk in response.stream(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                head += chunk[: max(0, keep - len(head))]
        finally:
            response.close()  # a connection in the middle of an answer is of no use to the next request
            response.release_conn()
        return Seen(size, digest.hexdigest(), bytes(head))

    def _folders(self, prefix: str) -> list[str]:
        found = self._client.list_objects(self._bucket, prefix)
        return [entry.object_name for entry in found if entry.is_dir and entry.object_name]

    def _below(self, prefix: str) -> list[Blob]:
        found = self._client.list_objects(self._bucket, prefix, recursive=True)
        return [Blob(one.object_name, one.last_modified) for one in found if one.object_name and one.last_modified]


def _unavailable(what: str) -> FedotaError:
    return FedotaError("unavailable", f"The object store {what}. Try again in a moment.", retry_after=2)
