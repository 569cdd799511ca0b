"""Where checkpoints are kept: a bucket of their own in any S3, or a directory with copies of its objects.

The `minio` package asks and answers; it is synchronous, so it works in a few threads beside the event loop. Objects are
named by the checkpoint's number alone: two notaries that sign at once want the same name, and `If-None-Match` lets one
of them have it.
"""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from fedota.errors import FedotaError
from fedota.kernel.settings import Secret

FOLDER: Final = "checkpoints/"
_NAME: Final = re.compile(r"([0-9]{20})\.txt")
_THREADS: Final = 8
_TIMEOUT: Final = urllib3.Timeout(connect=2, read=10)
_RETRIES: Final = urllib3.Retry(total=2, backoff_factor=0.1)  # connections that were kept die with a restarted S3
_AHEAD: Final = 32  # checkpoints that are fetched at once
_LINK: Final = timedelta(minutes=5)
_LARGEST: Final = 4096  # bytes of a checkpoint that are read: a forged one may be of any size
_EXISTS: Final = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
_MISSING: Final = {"NoSuchKey", "NoSuchObject", "ResourceNotFound", "NoSuchBucket"}

T = TypeVar("T")


def file_name(number: int) -> str:
    """The name of a checkpoint's file, such that names sort as numbers do."""
    return f"{number:020}.txt"


class File(NamedTuple):
    """A checkpoint's file."""

    number: int
    content: bytes


class Checkpoints(Protocol):
    """Where checkpoints are read from."""

    async def newest(self, after: int = 0) -> int:
        """The highest number past `after`; `after` where there is none."""

    def files(self, until: int) -> AsyncIterator[File]:
        """The files in order of their numbers, up to and including `until`."""


class Place(NamedTuple):
    """A bucket, and the keys to it."""

    url: str
    bucket: str
    access_key: Secret
    secret_key: Secret
    region: str = "us-east-1"


class Bucket:
    """Checkpoints in S3. Every method raises `FedotaError("unavailable")` when S3 does not answer as it should."""

    def __init__(self, place: Place, threads: ThreadPoolExecutor) -> None:
        address = urlsplit(place.url)
        self._http = urllib3.PoolManager(maxsize=_THREADS, timeout=_TIMEOUT, retries=_RETRIES)
        self._client = Minio(
            endpoint=address.netloc,
            access_key=place.access_key.reveal(),
            secret_key=place.secret_key.reveal(),
            secure=address.scheme == "https",
            region=place.region,
            http_client=self._http,
        )
        self._bucket = place.bucket
        self._threads = threads

    @classmethod
    @contextmanager
    def open(cls, place: Place) -> Iterator["Bucket"]:
        """The bucket; whether it is there yet only `check` tells."""
        # urllib3 warns of each retry with the path that it asked for
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        bucket = cls(place, threads)
        try:
            yield bucket
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            bucket._http.clear()

    async def check(self) -> None:
        """Raise unless S3 answers and has the bucket."""
        if not await self._ask(self._client.bucket_exists, self._bucket):
            raise FedotaError("unavailable", f"The object store has no bucket {self._bucket}.")

    async def create(self) -> None:
        """Make the bucket, if it is not there."""
        await self._ask(self._create)

    async def newest(self, after: int = 0) -> int:
        """The highest number past `after`; `after` where there is none."""
        return await self._ask(lambda: max(self._numbers(after), default=after))

    async def read(self, number: int) -> bytes | None:
        """The file of that number, if it is there."""
        return await self._ask(self._read, number)

    async def files(self, until: int) -> AsyncIterator[File]:
        """The files in order of their numbers, up to and including `until`; a few are fetched ahead."""
        numbers = iter(await self._ask(lambda: [number for number in self._numbers(0) if number <= until]))
        while some := list(islice(numbers, _AHEAD)):
            contents = await asyncio.gather(*(self.read(number) for number in some))
            for number, content in zip(some, contents, strict=True):
                if content is not None:
                    yield File(number, content)

    async def add(self, number: int, content: bytes) -> bool:
        """Write the file of that number unless there is one; whether it is this one that is there now."""
        return await self._ask(self._add, number, content)

    async def _ask(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except S3Error as error:
            raise _unavailable(f"refused what we asked of {self._bucket} ({error.code})") from None
        except (MinioException, urllib3.exceptions.HTTPError):
            raise _unavailable("does not answer") from None

    def _create(self) -> None:
        try:
            if not self._client.bucket_exists(self._bucket):
                self._client.make_bucket(self._bucket)
        except S3Error as error:
            if error.code not in _EXISTS:  # another notary was faster
                raise

    def _numbers(self, after: int) -> Iterator[int]:
        start = FOLDER + file_name(after)
        for item in self._client.list_objects(self._bucket, FOLDER, recursive=True, start_after=start):
            number = _number((item.object_name or "").removeprefix(FOLDER))
            if number is not None and number > after:
                yield number

    def _read(self, number: int) -> bytes | None:
        try:
            response = self._client.get_object(self._bucket, FOLDER + file_name(number), length=_LARGEST)
        except S3Error as error:
            if error.code in _MISSING:
                return None
            if error.code == "InvalidRange":  # an object without a byte has no first one to begin at
                return b""
            raise
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    def _add(self, number: int, content: bytes) -> bool:
        """By a presigned URL, because minio's own PUT takes no condition.

        What counts is what is read afterwards: not every S3 knows the condition, and a first try whose answer was lost
        has written it all the same.
        """
        key = FOLDER + file_name(number)
        if self._read(number) is None:
            url = self._client.get_presigned_url("PUT", self._bucket, key, expires=_LINK)
            digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
            headers = {"If-None-Match": "*", "Content-MD5": digest}  # the latter for buckets with object lock
            response = self._http.request("PUT", url, body=content, headers=headers)
            if response.status not in (200, 409, 412):
                raise _unavailable(f"took no checkpoint (HTTP status {response.status})")
        return self._read(number) == content


class Directory:
    """Copies of a bucket's objects in a directory, such as an auditor keeps."""

    def __init__(self, path: Path) -> None:
        inside = path / FOLDER
        self._path = inside if inside.is_dir() else path

    async def newest(self, after: int = 0) -> int:
        """The highest number past `after`; `after` where there is none."""
        return max(after, *self._numbers(), 0)

    async def files(self, until: int) -> AsyncIterator[File]:
        """The files in order of their numbers, up to and including `until`."""
        for number in self._numbers():
            if number <= until:
                yield File(number, self._read(self._path / file_name(number)))

    def _read(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(_LARGEST)
        except OSError as error:
            raise _unreadable(path, error) from None

    def _numbers(self) -> list[int]:
        try:
            found = [_number(path.name) for path in self._path.iterdir()]
        except OSError as error:
            raise _unreadable(self._path, error) from None
        return sorted(number for number in found if number is not None)


def _number(name: str) -> int | None:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _unreadable(path: Path, error: OSError) -> FedotaError:
    return FedotaError("unavailable", f"The copies of checkpoints cannot be read: {path}: {error.strerror}.")


def _unavailable(what: str) -> FedotaError:
    return FedotaError("unavailable", f"The object store {what}. Try again in a moment.", retry_after=2)
