"""A client and selectors that do not do as they should."""

import asyncio
import errno
import hashlib
import os
import time
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from fedota.client import running as module
from fedota.client.errors import ClientError
from fedota.client.train import Model
from fedota.contracts.kit import Kit
from fedota.process import serving
from fedota.runtime.protocol import CHECK_IN, MODELS, ComeBack, Finished, ModelRef, Selected
from fedota.runtime.web import json_response

MODEL = ModelRef(sha256="a" * 64, size=100)
SELECTED = Selected(ticket="t", round=1, attempt=1, model=MODEL, config={}, seconds=60)


class Damaged:
    """Selectors of which the first one that is asked has a model that is not what it says, `times` at most."""

    def __init__(self, times: int = 10**9) -> None:
        self.fetched = 0
        self.pause = 0.0  # seconds, once the first of them came
        self._times = times
        self._first = ""

    def app(self) -> web.Application:
        """One of them."""
        app = web.Application()
        app.router.add_post(CHECK_IN, self._check_in)
        app.router.add_get(MODELS, self._model)
        return app

    async def _check_in(self, request: web.Request) -> web.Response:
        self._first = self._first or request.host
        if self.fetched == 1 and (pause := self.pause):
            self.pause = 0.0
            return json_response(ComeBack(seconds=pause, update="none"))
        finished = request.host != self._first or self.fetched == self._times
        return json_response(Finished(reason="The training is finished.") if finished else SELECTED)

    async def _model(self, _: web.Request) -> web.Response:
        self.fetched += 1
        return web.Response(body=bytes(MODEL.size))


def train(model: Model, data: Path, config: object) -> tuple[Model, int, dict[str, float]]:
    """There is nothing to be trained on."""
    raise AssertionError("a damaged model was trained on")


def kit(*selectors: str) -> Kit:
    """A kit that names them."""
    return Kit(
        problem_id="p",
        name="A problem",
        organization="org",
        token="token",
        selectors=list(selectors),
        expires=int(time.time()) + 600,
    )


async def test_a_damaged_model_is_not_fetched_over_and_over(tmp_path: Path) -> None:
    """A pause lies between, and it ends when the client's patience does."""
    damaged, said = Damaged(), list[str]()
    async with asyncio.timeout(20), serving(damaged.app(), "127.0.0.1", 0) as url:
        with pytest.raises(ClientError, match="the model came damaged, whichever selector was asked"):
            await module.run(kit(url), train, tmp_path, patience=1.5, say=said.append)
    assert 2 <= damaged.fetched <= 4
    assert "a selector does not answer (the model came damaged); trying again ..." in said


async def test_another_selector_may_have_it_whole(tmp_path: Path) -> None:
    """It is asked next."""
    damaged = Damaged()
    async with (
        asyncio.timeout(20),
        serving(damaged.app(), "127.0.0.1", 0) as one,
        serving(damaged.app(), "127.0.0.1", 0) as other,
    ):
        await module.run(kit(one, other), train, tmp_path)
    assert damaged.fetched == 1


async def test_damages_far_from_each_other_are_not_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them the client may have waited for an hour to be selected; the model may have been whole meanwhile."""
    monkeypatch.setattr(module, "_CLOSELY", 0.1)
    damaged = Damaged(times=2)
    damaged.pause = 1.0
    async with asyncio.timeout(20), serving(damaged.app(), "127.0.0.1", 0) as url:
        await module.run(kit(url), train, tmp_path, patience=1.5)
    assert damaged.fetched == 2


async def test_a_full_disk_of_the_clients_is_told_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching the model over and over would not help."""

    class Whole(Damaged):
        """One whose model is what it says."""

        async def _check_in(self, _: web.Request) -> web.Response:
            model = ModelRef(sha256=hashlib.sha256(bytes(MODEL.size)).hexdigest(), size=MODEL.size)
            return json_response(msgspec.structs.replace(SELECTED, model=model))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = Whole()
    async with asyncio.timeout(20), serving(whole.app(), "127.0.0.1", 0) as url:
        monkeypatch.setattr(os, "mkdir", full)
        with pytest.raises(ClientError, match=r"cannot be read here.*No space left on device"):
            await module.run(kit(url), train, tmp_path)
    assert whole.fetched == 1
