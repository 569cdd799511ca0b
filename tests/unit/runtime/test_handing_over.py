"""How a coordinator reads the sums that are handed over to it."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import cast

import aiohttp
import pytest
from aiohttp import web

from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.process import serving
from fedota.runtime.coordinator import app as module
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.coordinator.training import Training
from fedota.runtime.protocol import PARTIALS, Meta
from fedota.runtime.web import problems


class Elsewhere:
    """A training that wants no sum."""

    def require_wanted(self, meta: Meta) -> Collector:
        """It does not."""
        raise FedotaError("round_over", f"The sum of {meta.life} is not asked for now.")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Where sums are handed over; one has its turn at a time."""
    app = web.Application(middlewares=[problems])
    app[module._TRAINING] = cast("Training", Elsewhere())
    app[module._TURNS] = asyncio.Semaphore(1)
    app.router.add_put(PARTIALS, module._take_partial)
    async with serving(app, "127.0.0.1", 0) as base:
        yield base + PARTIALS.format(name="a")


async def test_who_falls_silent_before_a_sum_holds_no_turn(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is given up after a while, and the others are answered meanwhile."""
    monkeypatch.setattr(module, "_META_SECONDS", 1.0)
    begun, never = asyncio.Event(), asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield struct.pack("<Q", 1000) + b"{"
        begun.set()
        await never.wait()

    meta = to_json(Meta(cohort="c", life="b", collection="1", accepted=[]))
    async with aiohttp.ClientSession() as http:
        waiting = asyncio.create_task(_put(http, url, silent()))
        await begun.wait()
        assert await _put(http, url, struct.pack("<Q", len(meta)) + meta) == (409, "round_over")
        assert not waiting.done()
        assert await waiting == (503, "unavailable")
        never.set()


async def _put(http: aiohttp.ClientSession, url: str, data: object) -> tuple[int, str]:
    async with http.put(url, data=data) as reply:
        return reply.status, (await reply.json(content_type=None))["code"]
