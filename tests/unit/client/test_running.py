"""A client and selectors that do not do as they should."""

import asyncio
import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from aiohttp import web

from fedota.client import running as module
from fedota.client.errors import ClientError
from fedota.client.train import Model
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError
from fedota.process import serving
from fedota.runtime.protocol import CHECK_IN, MODELS, TICKET, UPDATES, ComeBack, Finished, ModelRef, Selected
from fedota.runtime.web import json_response, problem_response

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


class Late:
    """A selector that takes no more updates, and then says what became of the one that is kept."""

    def __init__(self, answer: Finished) -> None:
        self._answer = answer
        self._body = safetensors.numpy.save({"w": np.zeros(3, np.float32)})

    def app(self) -> web.Application:
        """Its doors."""
        app = web.Application()
        app.router.add_post(CHECK_IN, self._check_in)
        app.router.add_get(MODELS, self._model)
        app.router.add_post(UPDATES, self._update)
        return app

    async def _check_in(self, request: web.Request) -> web.Response:
        if TICKET in request.headers:
            return json_response(self._answer)
        model = ModelRef(sha256=hashlib.sha256(self._body).hexdigest(), size=len(self._body))
        return json_response(msgspec.structs.replace(SELECTED, model=model))

    async def _model(self, _: web.Request) -> web.Response:
        return web.Response(body=self._body)

    async def _update(self, _: web.Request) -> web.Response:
        return problem_response(FedotaError("round_over", "The round takes no more updates.").problem)


END: Final = "The training is finished."
FATES = [
    (Finished(reason=END, update="counted"), "round 1: your update counts"),
    (Finished(reason=END, update="over"), "round 1: ended without you"),
    (
        Finished(reason=END, update="over", known=False),
        "round 1: is over; whether your update counts is not known here any more, the problem's page shows it",
    ),
]


@pytest.mark.parametrize(("answer", "words"), FATES)
async def test_an_update_that_comes_too_late_may_have_come_before(tmp_path: Path, answer: Finished, words: str) -> None:
    """The first answer to it may have been lost: what became of it is asked, not guessed."""
    said: list[str] = []

    def same(model: Model, data: Path, config: object) -> tuple[Model, int, dict[str, float]]:
        return model, 1, {}

    async with asyncio.timeout(20), serving(Late(answer).app(), "127.0.0.1", 0) as url:
        await module.run(kit(url), same, tmp_path, say=said.append)
    assert said[-3:] == ["round 1: too late, no more updates are taken", words, END]


def test_lines_that_alternate_are_not_said_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each again only after a while that grows, and at once when the training went on meanwhile."""
    clock, said = 0.0, list[tuple[float, str]]()
    monkeypatch.setattr(module, "monotonic", lambda: clock)
    lines = module._Lines(lambda line: said.append((clock, line)))
    for second in range(1000):
        clock = float(second)
        lines.now_and_then("waiting")
        lines.now_and_then("no answer")
    assert said == [(second, line) for second in (0, 60, 180, 420, 900) for line in ("waiting", "no answer")]
    said.clear()
    for _ in range(2):
        lines.news("round 1")
        lines.now_and_then("waiting")
    assert said == [(999, "round 1"), (999, "waiting")]


class Crowded:
    """A selector that puts off whoever fetches the model, so many times; then the training is finished."""

    def __init__(self, times: int) -> None:
        self.left = times

    def app(self) -> web.Application:
        """Its doors."""
        app = web.Application()
        app.router.add_post(CHECK_IN, self._check_in)
        app.router.add_get(MODELS, self._model)
        return app

    async def _check_in(self, _: web.Request) -> web.Response:
        return json_response(SELECTED if self.left else Finished(reason="The training is finished."))

    async def _model(self, _: web.Request) -> web.Response:
        self.left -= 1
        return problem_response(FedotaError("unavailable", "Too many fetch it.", retry_after=-1).problem)


async def test_a_crowd_is_waited_out_and_told(tmp_path: Path) -> None:
    """Whoever is put off is heard, so patience does not end; and it waits, whatever it is told."""
    said, began = list[str](), time.monotonic()
    async with asyncio.timeout(20), serving(Crowded(2).app(), "127.0.0.1", 0) as url:
        await module.run(kit(url), train, tmp_path, patience=0.5, say=said.append)
    assert "a selector puts this client off (Too many fetch it.); trying again ..." in said
    assert time.monotonic() - began >= 2


def test_a_training_may_outlive_a_run_that_was_cancelled() -> None:
    """Nobody waits for what it returns any more, and its thread ends in peace."""
    over, threads = threading.Event(), set(threading.enumerate())

    async def cancelled() -> None:
        async with asyncio.timeout(0.1):
            await module._in_thread(lambda: over.wait(20))

    with pytest.raises(TimeoutError):
        asyncio.run(cancelled())
    (thread,) = (thread for thread in threading.enumerate() if thread not in threads and thread.name == "train")
    failed: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, failed.append
    try:
        over.set()
        thread.join(20)
    finally:
        threading.excepthook = before
    assert not thread.is_alive() and not failed
