"""What the launcher makes of what a component says, and a component's certificate."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from fedota.contracts.runtime import Ready, SelectorSettings
from fedota.kernel.service import serving
from services.orchestrator.launchers.component import Component, Pace, Program
from services.orchestrator.launchers.files import CERTIFICATE, READY


def _nobody(*_: Any) -> Any:
    raise AssertionError("nobody is told, and nothing is started")


async def test_a_certificate_that_cannot_be_renewed_is_at_the_next_look(tmp_path: Path) -> None:
    """The one before it is good for months yet: a full disk now must not end a selector that is well."""
    path = tmp_path / CERTIFICATE
    path.write_bytes(b"old")
    os.utime(path, (1, 1))
    program = Program("selector-0", "module", tmp_path, 1, _nobody, certificate=lambda: b"new")
    in_the_way = tmp_path / f"{CERTIFICATE}.new"
    in_the_way.mkdir()
    async with aiohttp.ClientSession() as http:
        component = Component(program, _nobody, http, Pace())
        with capture_logs() as logs:
            component._renew()
        assert [(line["log_level"], line["component"]) for line in logs] == [("warning", "selector-0")]
        assert path.read_bytes() == b"old"
        in_the_way.rmdir()
        component._renew()
        assert path.read_bytes() == b"new"


def _settings(port: int) -> SelectorSettings:
    return SelectorSettings(problem_id="p", run=1, name="s", coordinator="", token_key="", key="", port=port)


@asynccontextmanager
async def _saying(directory: Path, say: Callable[[], web.Response]) -> AsyncIterator[Component]:
    """A component that listens, and says this when it is asked whether it is ready; it is waited for half a second."""

    async def readyz(_: web.Request) -> web.Response:
        return say()

    app = web.Application()
    app.router.add_get("/readyz", readyz)
    program = Program("coordinator", "module", directory, 1, _settings)
    async with serving(app, "127.0.0.1", 0) as url, aiohttp.ClientSession() as http:
        (directory / READY).write_bytes(msgspec.json.encode(Ready(url=url, pid=1)))
        yield Component(program, _nobody, http, Pace(ready=0.5, look=0.05))


def _failing(words: str) -> web.Response:
    return web.json_response({"status": "failing", "failing": {"training": words}}, status=503)


async def test_what_gets_on_is_waited_for(tmp_path: Path) -> None:
    """A large model is fetched from a slow store for longer than a process may say nothing."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    def say() -> web.Response:
        late = loop.time() - began
        return _failing(f"{late:.1f} of 1.5 MB") if late < 1.5 else web.json_response({"status": "ready"})

    async with _saying(tmp_path, say) as component:
        assert await component._readiness() == msgspec.json.decode((tmp_path / READY).read_bytes(), type=Ready).url
    assert component._said == ""


@pytest.mark.parametrize("kinds", [["NATS did not answer"], ["NATS did not answer", "503"]])
async def test_who_says_the_same_again_and_again_is_stuck(tmp_path: Path, kinds: list[str]) -> None:
    """By turns, too: what fails in two ways does not get on."""
    words = cycle(kinds)
    async with asyncio.timeout(10), _saying(tmp_path, lambda: _failing(next(words))) as component:
        assert await component._readiness() == ""
        assert component._said in kinds
        assert component._stuck(was_ready=False) == "was not ready and said nothing new for 0.5 seconds"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "503 Service Unavailable"),
        (b"\xff{}", "503 Service Unavailable"),
        (b'{"failing": ["x"]}', "503 Service Unavailable"),
        (b'{"failing": {"a": "one", "b": "two"}}', "one; two"),
        (b'{"failing": {"a": "' + b"x" * 60_000 + b'"}}', "x" * 500),
        (b" " * 2_000_000, "503 Service Unavailable"),
    ],
)
async def test_what_a_component_says_is_read_with_care(tmp_path: Path, body: bytes, said: str) -> None:
    """Its words are told to people, and it may be anything by now."""
    async with _saying(tmp_path, lambda: web.Response(status=503, body=body)) as component:
        url = component._announced()
        assert url is not None
        assert not await component._is_ready(url)
        assert component._said == said
