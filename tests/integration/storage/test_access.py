"""Who may read and write what: links for people and coordinators, nothing for anybody else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import nats
import nats.errors
import pytest
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.contracts.commands import PresignDownload
from fedota.contracts.runtime import Presigned, PresignRequest
from fedota.errors import FedotaError, Problem
from fedota.events import to_json
from fedota.kernel.bus import ERROR_HEADER
from fedota.kernel.nats_accounts import Operator, push_account
from tests.integration.storage.conftest import BODIES, DATA, FILES, MODEL, World, announced, asked, got, key_of, put
from tests.support.services import new_id


async def test_a_link_gives_the_file_and_nothing_else(storage: World, problem_id: str) -> None:
    """GET of that key, as long as it was signed for."""
    await storage.store(problem_id, FILES, BODIES)
    await storage.manifest(problem_id, 1)
    link = await storage.download(problem_id, key_of(problem_id, FILES[0]))
    assert await got(link) == MODEL
    assert await got(await storage.download(problem_id, f"problems/{problem_id}/files/manifest.json"))
    assert await asked("DELETE", link) == 403
    assert await put(link, b"other", {}) == 403
    assert await asked("GET", link.replace(FILES[0].sha256, FILES[1].sha256)) == 403
    assert await asked("GET", link.replace("Expires=900", "Expires=9000")) == 403
    assert await got(link) == MODEL


async def test_what_is_not_there_has_no_link(storage: World, problem_id: str) -> None:
    """A link to nothing would only be found out later."""
    command = PresignDownload(problem_id=problem_id, key=key_of(problem_id, FILES[0]))
    assert (await storage.platform.refused(command)).problem.code == "not_found"


async def test_another_problems_file_has_no_link(storage: World, problem_id: str) -> None:
    """Not by its own key, nor by a way out of the prefix; and an id that is no UUID opens nothing."""
    await storage.store(problem_id, FILES, BODIES)
    own, other = key_of(problem_id, FILES[0]), new_id()
    for key in (
        own,
        f"problems/{other}/../{problem_id}/files",
        f"problems/{other}/./{own}",
        f"problems/{other}//x",
        "",
    ):
        command = PresignDownload(problem_id=other, key=key)
        assert (await storage.platform.refused(command)).problem.code == "key_forbidden"
    for wrong in (f"{other}/../{problem_id}", "", problem_id.upper()):
        command = PresignDownload(problem_id=wrong, key=own)
        assert (await storage.platform.refused(command)).problem.code == "invalid_field"


async def test_without_a_signature_nothing_is_done(storage: World, problem_id: str) -> None:
    """Whoever reaches the store's address and knows every key still reads, writes, deletes and lists nothing."""
    await storage.store(problem_id, FILES, BODIES)
    key = key_of(problem_id, FILES[1])
    bucket = f"{storage.s3.url}/{storage.bucket}"
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        assert await asked(method, f"{bucket}/{key}") == 403
    assert await put(f"{bucket}/problems/{problem_id}/new", b"x", {"Content-Length": "1"}) == 403
    for place in (f"{bucket}?list-type=2", f"{bucket}/", storage.s3.url, f"{bucket}?policy", f"{bucket}?uploads"):
        assert await asked("GET", place) == 403
    assert await asked("POST", f"{bucket}?delete", data=b"<Delete/>") == 403
    assert await storage.object(key) == DATA


class Coordinator:
    """A problem's own NATS account, as the orchestrator makes it."""

    def __init__(self, client: Client, problem_id: str) -> None:
        self._client = client
        self.problem_id = problem_id

    async def presign(self, problem_id: str | None = None, body: bytes | None = None, **wish: Any) -> Presigned:
        """What storage answers to a wish."""
        subject = subjects.runtime(problem_id or self.problem_id, "presign")
        message = await self._client.request(subject, body or to_json(PresignRequest(**wish)), timeout=2)
        if message.headers and ERROR_HEADER in message.headers:
            raise FedotaError.of(msgspec.json.decode(message.data, type=Problem))
        return msgspec.json.decode(message.data, type=Presigned)

    async def refused(self, **wish: Any) -> str:
        """The code of the error that it answers with."""
        with pytest.raises(FedotaError) as refused:
            await self.presign(**wish)
        return refused.value.problem.code


@asynccontextmanager
async def coordinator(world: World, problem_id: str) -> AsyncIterator[Coordinator]:
    """With credentials for this problem and no other."""
    servers = world.platform.servers
    minted = Operator.read(servers.nats_operator).problem_account(problem_id, platform=servers.platform_account)
    credentials = world.directory / f"{new_id()}.creds"
    credentials.write_text(minted.credentials)
    async with _connected(servers.nats_url, str(servers.nats_keys["system"])) as system:
        await push_account(system, minted.jwt)
    async with _connected(servers.nats_url, str(credentials)) as client:
        yield Coordinator(client, problem_id)


@asynccontextmanager
async def _connected(url: str, credentials: str) -> AsyncIterator[Client]:
    async def ignore(_: Exception) -> None:
        """A refused publish is told by what does not happen."""

    client = await nats.connect(url, user_credentials=credentials, error_cb=ignore)
    try:
        yield client
    finally:
        await client.close()


def checkpoint(problem_id: str, body: bytes, ending: str = "safetensors") -> dict[str, Any]:
    """The wish to write a checkpoint of the first round."""
    file = announced("x", body)
    key = f"problems/{problem_id}/checkpoints/1/1-{file.sha256[:16]}.{ending}"
    return {"method": "PUT", "key": key, "size": file.size, "sha256": file.sha256}


async def test_a_coordinator_reads_the_model_and_writes_checkpoints(storage: World, problem_id: str) -> None:
    """Each once: 412 tells a coordinator that repeats itself after a crash that the object is there."""
    await storage.store(problem_id, FILES, BODIES)
    async with coordinator(storage, problem_id) as asking:
        model = await asking.presign(method="GET", key=key_of(problem_id, FILES[0]))
        assert (await got(model.url), model.headers) == (MODEL, {})
        for wish, body in ((checkpoint(problem_id, MODEL), MODEL), (checkpoint(problem_id, b"{}", "json"), b"{}")):
            signed = await asking.presign(**wish)
            assert await put(signed.url, body[:-1] + b"!", signed.headers) == 400
            assert await put(signed.url, body, {}) == 403
            assert await put(signed.url, body, signed.headers) == 200
            again = await asking.presign(**wish)
            assert await put(again.url, body, again.headers) == 412
            assert await got((await asking.presign(method="GET", key=wish["key"])).url) == body


async def test_a_coordinator_writes_nothing_else(storage: World, problem_id: str) -> None:
    """Not the setter's files, not another name, not a digest that is not its own."""
    good = checkpoint(problem_id, MODEL)
    async with coordinator(storage, problem_id) as asking:
        forbidden = [
            good | {"key": key_of(problem_id, FILES[0])},
            good | {"key": f"problems/{problem_id}/checkpoints/1/model.safetensors"},
            good | {"key": good["key"].replace(problem_id, new_id())},
            good | {"key": f"problems/{problem_id}/checkpoints/../../{new_id()}/x"},
            good | {"sha256": "0" * 64},
            {"method": "GET", "key": good["key"].replace(problem_id, new_id())},
        ]
        assert [await asking.refused(**wish) for wish in forbidden] == ["key_forbidden"] * len(forbidden)
        invalid = [good | {"size": 0}, good | {"sha256": "x"}, good | {"method": "DELETE"}]
        assert [await asking.refused(**wish) for wish in invalid] == ["invalid_field"] * len(invalid)
        assert await asking.refused(body=b"not json") == "invalid_request"


async def test_a_coordinator_reaches_no_other_problem(storage: World, problem_id: str) -> None:
    """Its account has no way to another's subject; and an account for what is no problem's id opens nothing."""
    other = new_id()
    async with coordinator(storage, problem_id) as asking:
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await asking.presign(other, method="GET", key=f"problems/{other}/x")
    async with coordinator(storage, "not-a-uuid") as asking:
        assert await asking.refused(method="GET", key="problems/not-a-uuid/x") == "invalid_field"
