"""What a selector accepts of its clients, and what it refuses by name, the round's result untouched."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedota.errors import CATALOGUE
from fedota.events.problems import Plan
from tests.integration.runtime.conftest import (
    Component,
    Participant,
    Weights,
    World,
    another_waits,
    assert_same,
    running,
    until,
    weighted_mean,
)


def model() -> Weights:
    """Two tensors, one of them large enough to be read past aiohttp."""
    return {"large": np.zeros((300, 1000), np.float32), "steps": np.array([1], np.int64)}


def plan(**changes: Any) -> Plan:
    """Two clients a round, both needed."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 2, "minimum_fraction": 1.0, "selectors": 1}
    return Plan(**{**usual, **changes})


class Bare:
    """A client without the SDK, which may send what it likes."""

    def __init__(self, http: aiohttp.ClientSession, selector: Component, token: str, name: str) -> None:
        self.http = http
        self.url = selector.url
        self.headers = {"Authorization": f"Bearer {token}", "Fedota-Client": name}
        self.ticket = ""

    async def check_in(self, **headers: str) -> dict[str, Any]:
        """What the selector says."""
        async with self.http.post(f"{self.url}/v1/check-in", headers={**self.headers, **_named(headers)}) as reply:
            answer: dict[str, Any] = await reply.json(content_type=None)
        self.ticket = answer.get("ticket", self.ticket)
        return answer

    async def fetch(self, digest: str) -> None:
        """Have the round's weights: from now on the round waits for this client, should its selector be lost."""
        async with self.http.get(f"{self.url}/v1/models/{digest}", headers=self.headers) as reply:
            assert reply.status == 200
            await reply.read()

    async def send(self, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and answer to an update."""
        usual = {**self.headers, "Fedota-Ticket": self.ticket, "Fedota-Examples": "1"}
        body = io.BytesIO(body) if isinstance(body, bytes) else body
        async with self.http.post(f"{self.url}/v1/updates", data=body, headers={**usual, **_named(headers)}) as reply:
            return reply.status, await reply.json(content_type=None)

    async def refused(self, code: str, body: Any, said: str = "", **headers: str) -> None:
        """Have an update refused with this code."""
        status, answer = await self.send(body, **headers)
        assert (answer["code"], status) == (code, CATALOGUE[code].status), answer
        assert said in answer["detail"]


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@asynccontextmanager
async def reporting(world: World, plan_: Plan | None = None, *, clients: int = 2) -> AsyncIterator[list[Bare]]:
    """So many clients, selected."""
    await world.launch(plan_ or plan(), model())
    async with aiohttp.ClientSession() as http:
        bare = [
            Bare(http, world.selectors[0], world.token(f"org {number}"), f"client-{number}")
            for number in range(1, clients + 1)
        ]
        answers = await asyncio.gather(*(one.check_in() for one in bare))
        assert [answer["status"] for answer in answers] == ["selected"] * clients
        yield bare


def body(value: float = 1.0, **changes: Any) -> bytes:
    """An update with this value everywhere."""
    tensors = {name: np.full_like(values, value) for name, values in model().items()}
    return safetensors.numpy.save({**tensors, **changes})


def _with(tensors: dict[str, Any], *without: str) -> Callable[[], bytes]:
    def made() -> bytes:
        whole = {name: values for name, values in model().items() if name not in without}
        return safetensors.numpy.save({**whole, **tensors})

    return made


def _header(text: str, data: int = 0) -> Callable[[], bytes]:
    return lambda: len(text).to_bytes(8, "little") + text.encode() + bytes(data)


async def uploads(world: World, count: int) -> None:
    """So many updates are on their way in."""
    async with asyncio.timeout(10):
        while (await world.metrics(world.selectors[0]))["fedota_uploads"] != count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


_SPOILED: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "empty": ("update_malformed", "cut off", lambda: b""),
    "a few bytes": ("update_malformed", "cut off", lambda: b"abc"),
    "not safetensors": ("update_malformed", "", lambda: b"\x80\x04pickle" * 1000),
    "a header that claims too much": ("update_malformed", "cut off", lambda: b"\xff" * 8 + bytes(100)),
    "no JSON": ("update_malformed", "", _header("{]")),
    "cut off": ("update_malformed", "", lambda: body()[:-1]),
    "trailing bytes": ("update_malformed", "", lambda: body() + b"\0"),
    "overlapping tensors": (
        "update_malformed",
        "",
        _header(
            '{"large":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            '"steps":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
            8,
        ),
    ),
    "no tensor": ("update_mismatch", "is missing", lambda: safetensors.numpy.save({})),
    "a missing tensor": ("update_mismatch", "'steps' is missing", _with({}, "steps")),
    "an extra tensor": ("update_mismatch", "no tensor 'more'", _with({"more": np.zeros(1, np.float32)})),
    "another shape": (
        "update_mismatch",
        "'large' is float32[1000, 300], but the model's is float32[300, 1000]",
        _with({"large": np.zeros((1000, 300), np.float32)}),
    ),
    "another type": ("update_mismatch", "'steps' is int32[2]", _with({"steps": np.array([1, 2], np.int32)})),
    "a type without sums": ("update_mismatch", "dtype BOOL", _with({"steps": np.zeros(8, bool)})),
    "NaN": ("update_not_finite", "'large'", lambda: body(large=_spiked(np.nan))),
    "infinity": ("update_not_finite", "'large'", lambda: body(large=_spiked(-np.inf))),
    "too large": ("update_too_large", "are the most", lambda: body() + bytes(100_000)),
    "thousands of empty tensors": (
        "update_too_large",
        "",
        lambda: safetensors.numpy.save({f"t{number}": np.zeros(0, np.float32) for number in range(30_000)}),
    ),
}


def _spiked(value: float) -> Any:
    large = model()["large"].copy()
    large[299, 999] = value
    return large


async def test_a_spoiled_update_is_refused_by_name_and_touches_nothing(world: World) -> None:
    """Whatever is wrong with it: the reason is said and reported, and the sum is what it was."""
    async with reporting(world) as (good, bad):
        status, answer = await good.send(body(3.0), Fedota_Examples="2", Fedota_Metrics='{"loss": 1.0}')
        assert (status, answer) == (200, {"round": 1, "attempt": 1})
        for code, said, made in _SPOILED.values():
            await bad.refused(code, made(), said)
        metrics = await world.metrics(world.selectors[0])
        assert metrics["fedota_updates_accepted_total"] == 1
        for code in ("update_malformed", "update_mismatch", "update_not_finite", "update_too_large"):
            wanted = sum(1 for spoiled in _SPOILED.values() if spoiled[0] == code)
            assert metrics[f'fedota_refusals_total{{code="{code}"}}'] == wanted
        status, _ = await bad.send(body(1.0), Fedota_Examples="1")
        assert status == 200
        final = await until(lambda: world.platform.final)
    counted = [(model_of(3.0), 2), (model_of(1.0), 1)]
    found = world.platform.weights(final)
    assert_same(found, weighted_mean(counted))
    assert [refusal.organization for refusal in final.refusals] == ["org 2"] * len(_SPOILED)
    assert [refusal.code for refusal in final.refusals] == [code for code, _, _ in _SPOILED.values()]
    assert all(refusal.detail for refusal in final.refusals)
    assert (final.reported, final.examples, final.participants) == (2, 3, ["org 1", "org 2"])


def model_of(value: float) -> Weights:
    """The model with this value everywhere."""
    return {name: np.full_like(values, value) for name, values in model().items()}


_EXAMPLES = ["0", "-1", "1.5", "", "1e3", "1000000001", "99999999999999999999", "\u0661", "abc"]
_METRICS = {
    '{"a": "b"}': "got `str`",
    "[1]": "Expected `object`",
    '{"a": 1': "it is not JSON",
    '{"": 1}': "length >= 1",
    '{"a": NaN}': "it is not JSON",
    json.dumps({str(number): 1 for number in range(65)}): "length <= 64",
    json.dumps({"a": 1, "b" * 5000: 1}): "at most 4096 bytes, and has 5015",
}


async def test_examples_and_metrics_are_numbers_within_bounds(world: World) -> None:
    """No client gives itself the weight that it likes; the update can be sent again as it should be."""
    async with reporting(world) as (one, other):
        for examples in _EXAMPLES:
            said = "whole number from 1 to 1000000000"
            await one.refused("update_examples", body(), said, Fedota_Examples=examples)
        for metrics, said in _METRICS.items():
            await one.refused("invalid_field", body(), said, Fedota_Metrics=metrics)
        assert (await one.send(body(1.0), Fedota_Metrics='{"loss": 3, "accuracy": 0.5}'))[0] == 200
        assert (await other.send(body(2.0), Fedota_Metrics='{"loss": 0}', Fedota_Examples="1000000000"))[0] == 200
        final = await until(lambda: world.platform.final)
    assert final.examples == 1_000_000_001
    assert final.metrics == pytest.approx({"accuracy": 0.5, "loss": 3 / 1_000_000_001})
    assert_same(world.platform.weights(final), weighted_mean([(model_of(1.0), 1), (model_of(2.0), 10**9)]))


async def test_an_update_counts_once(world: World) -> None:
    """Sent again, at once or while it is still on its way, it is refused."""
    async with reporting(world) as (one, other):
        halves = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            sent = 600_000
            yield body()[:sent]
            while not halves.is_set():  # it lives: only one that stalls gives way to another
                await asyncio.sleep(0.05)
                yield body()[sent : sent + 100]
                sent += 100
            yield body()[sent:]

        first = asyncio.create_task(one.send(slowly(), Content_Length=str(len(body()))))
        await uploads(world, 1)
        await one.refused("already_reported", body())
        halves.set()
        assert (await first)[0] == 200
        await one.refused("already_reported", body())
        assert (await other.send(body()))[0] == 200
        final = await until(lambda: world.platform.final)
        assert final.reported == 2


async def test_tickets_are_bound_to_their_organization_and_round(world: World) -> None:
    """Forged, of another organization, or used: refused."""
    async with reporting(world) as (one, other):
        await one.refused("ticket_refused", body(), Fedota_Ticket="")
        await one.refused("ticket_refused", body(), Fedota_Ticket="a.b.c")
        await one.refused("ticket_refused", body(), Fedota_Ticket=one.ticket[:-6] + "AAAAAA")
        await one.refused("ticket_refused", body(), "another organization", Fedota_Ticket=other.ticket)
        for bare in (one, other):
            assert (await bare.send(body()))[0] == 200
        await until(lambda: world.platform.final)
        answer = await one.check_in(Fedota_Ticket=one.ticket)
        assert (answer["status"], answer["update"]) == ("finished", "counted")
        await one.refused("already_reported", body())


async def test_only_the_participation_token_opens_the_door(world: World) -> None:
    """At every address."""
    await world.launch(plan(), model())
    selector = world.selectors[0]
    async with aiohttp.ClientSession() as http:
        for token, said in (
            ("", "No token was sent"),
            ("nonsense", "not signed"),
            (world.token("org 1", seconds=-5), "expired"),
            (world.token("org 1", problem_id="other"), "another problem"),
        ):
            headers = {"Authorization": f"Bearer {token}", "Fedota-Client": "c"}
            for method, path in (("POST", "check-in"), ("POST", "updates"), ("GET", f"models/{world.digest}")):
                async with http.request(method, f"{selector.url}/v1/{path}", headers=headers) as reply:
                    assert reply.status == 401 and reply.headers["WWW-Authenticate"].startswith("Bearer")
                    answer = await reply.json(content_type="application/problem+json")
                    assert answer["code"] == "token_refused" and said in answer["detail"]
        async with http.get(f"{world.coordinator.url}/v1/models/{world.digest}", headers=headers) as reply:
            assert reply.status == 401


async def test_requests_that_are_not_well_formed(world: World) -> None:
    """Each is answered in words."""
    async with reporting(world) as (one, _):
        await one.refused("unsupported_encoding", body(), Content_Encoding="gzip")
        async with one.http.get(f"{one.url}/v1/models/{'0' * 64}", headers=one.headers) as reply:
            assert (reply.status, (await reply.json(content_type=None))["code"]) == (404, "not_found")
        async with one.http.get(f"{one.url}/v1/updates", headers=one.headers) as reply:
            assert (reply.status, (await reply.json(content_type=None))["code"]) == (405, "method_not_allowed")
        answer = await one.check_in(Fedota_Client="no spaces, please")
        assert answer["code"] == "invalid_field"


async def test_a_body_that_is_longer_than_it_may_be_is_cut_off(world: World) -> None:
    """Also one that does not say how long it is."""
    async with reporting(world) as (one, _):

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(2000):
                yield bytes(65_536)

        await one.refused("update_too_large", endless())


async def test_a_client_that_goes_away_in_the_middle_leaves_nothing(world: World) -> None:
    """Its update does not count, and may be sent again."""
    async with reporting(world) as (one, other):
        assert (await other.send(body(5.0)))[0] == 200

        async def broken() -> AsyncIterator[bytes]:
            yield body(9.0)[:700_000]
            raise RuntimeError("gone")

        with pytest.raises((RuntimeError, aiohttp.ClientError)):
            await one.send(broken(), Content_Length=str(len(body())))
        await uploads(world, 0)
        again = await one.check_in()
        assert (again["status"], again["ticket"]) == ("selected", one.ticket)
        assert (await one.send(body(1.0)))[0] == 200
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(model_of(5.0), 1), (model_of(1.0), 1)]))


async def test_a_client_that_goes_away_is_not_selected(world: World, tmp_path: Path) -> None:
    """A long poll that was closed is no client that waits."""
    await world.launch(plan(), model())
    async with aiohttp.ClientSession() as http:
        gone = Bare(http, world.selectors[0], world.token("org 9"), "gone")
        task = asyncio.create_task(gone.check_in())
        await until(lambda: world.platform.reports[-1].waiting == 1)
        task.cancel()
        await asyncio.wait({task})
    await until(lambda: world.platform.reports[-1].waiting == 0)
    clients = [Participant(number, free=True) for number in (1, 2)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        final = await until(lambda: world.platform.final)
    assert final.participants == ["org 1", "org 2"]


async def test_more_updates_at_once_than_there_is_memory_for(world: World) -> None:
    """They wait for their turn; the sum is the same in any order."""
    count = 40
    async with reporting(world, plan(goal_count=count), clients=count) as clients:
        results = await asyncio.gather(
            *(one.send(body(float(n)), Fedota_Examples=str(n)) for n, one in enumerate(clients, 1))
        )
        assert {status for status, _ in results} == {200}
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(model_of(float(n)), n) for n in range(1, count + 1)]))


async def test_ready_and_metrics(world: World) -> None:
    """What a launcher and a monitor ask for."""
    await world.launch(plan(), model())
    async with aiohttp.ClientSession() as http:
        for component in world.components:
            for path in ("livez", "readyz", "metrics"):
                async with http.get(f"{component.url}/{path}") as reply:
                    assert reply.status == 200
    assert (await world.metrics(world.coordinator))["fedota_selectors"] == 1
    assert (
        msgspec.json.decode((world.coordinator.directory / "ready.json").read_bytes())["url"] == world.coordinator.url
    )


async def test_an_organization_that_is_revoked_takes_part_no_more(world: World) -> None:
    """Whether it waits or has a ticket; what is in a sum stays, and the round goes on with others."""
    async with reporting(world, plan(rounds=2)) as (one, gone):
        waiting = Bare(one.http, world.selectors[0], world.token("org 2"), "another")
        held = asyncio.create_task(waiting.check_in())
        await another_waits(world)
        world.platform.state.members["org 2"] = False
        assert (await one.send(body(1.0)))[0] == 200  # which is reported, and the answer tells
        answer = await asyncio.wait_for(held, 10)
        assert answer["code"] == "token_refused" and "The participation of org 2 was revoked" in answer["detail"]
        await gone.refused("token_refused", body(), "was revoked")
        assert (await gone.check_in())["code"] == "token_refused"
        await world.coordinator.kill()
        await world.selectors[0].kill()
        await asyncio.gather(world.coordinator.start(), world.selectors[0].start())
        async with asyncio.timeout(10):
            while "code" not in (answer := await asyncio.wait_for(gone.check_in(), 30)):
                assert answer["status"] == "come_back"
        assert answer["code"] == "token_refused"
