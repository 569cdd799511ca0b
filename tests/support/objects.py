"""The object store, for who holds its keys."""

from collections.abc import Iterator
from contextlib import contextmanager

import urllib3
from minio import Minio

from fedota.local.seaweedfs import S3Access


@contextmanager
def opened(access: S3Access) -> Iterator[Minio]:
    """A client, whose connections are closed afterwards."""
    pool = urllib3.PoolManager()
    place = access.url.removeprefix("http://")
    try:
        yield Minio(place, access_key=access.access_key, secret_key=access.secret_key, secure=False, http_client=pool)
    finally:
        pool.clear()


def content(store: Minio, bucket: str, key: str) -> bytes:
    """An object's bytes."""
    reply = store.get_object(bucket, key)
    try:
        return reply.read()
    finally:
        reply.close()
        reply.release_conn()
