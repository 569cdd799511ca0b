"""A client and selectors that do not do as they should."""

import asyncio
import time
from pathlib import Path

import pytest
from aiohttp import web

from fedota.client import running as module
from fedota.client.errors import ClientError
from fedota.client.train import Model
from fedota.contracts.kit import Kit
from fedota.process import serving
from fedota.runtime.protocol import CHECK_IN, MODELS, Finished, ModelRef, Selected
from fedota.runtime.web import json_response

MODEL = ModelRef(sha256="a" * 64, size=100)
SELECTED = Selected(ticket="t", round=1, attempt=1, model=MODEL, config={}, seconds=60)


class Damaged:
    """Selectors of which the first one that is asked has a model that is not what it says."""

    def __init__(self) -> None:
        self.fetched = 0
        self._first = ""

    def app(self) -> web.Application:
        """One of them."""
        app = web.Application()
        app.router.add_post(CHECK_IN, self._check_in)
        app.router.add_get(MODELS, self._model)
        return app

    async def _check_in(self, request: web.Request) -> web.Response:
        self._first = self._first or request.host
        return json_response(SELECTED if request.host == self._first else Finished(reason="The training is finished."))

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
