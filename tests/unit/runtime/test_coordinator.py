"""What a coordinator makes of bodies that no selector sends, over real connections."""

import gzip
import zlib

import aiohttp
import pytest
from aiohttp import web

from fedota.process import serving
from fedota.runtime.coordinator.app import _TRAINING, _answer_claim, _take_state
from fedota.runtime.coordinator.partials import MOST_META, Partials
from fedota.runtime.coordinator.training import Training
from fedota.runtime.protocol import CLAIMS, PARTIALS, STATES
from fedota.runtime.web import Handler, problems

TOLD = b'{"name": "s", "life": "l", "waiting": 0, "cohort": "k", "ticket": "t", "issuer": "i"}'


@pytest.mark.parametrize("way", ["gzip", "deflate"])
@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", STATES, 400), ("POST", CLAIMS, 400), ("PUT", PARTIALS, 413)]
)
async def test_what_is_packed_is_not_unpacked(way: str, method: str, path: str, status: int) -> None:
    """Not even where it would be good JSON then: the event loop would do nothing else meanwhile."""
    bomb = (gzip.compress if way == "gzip" else zlib.compress)(TOLD + b" " * 20_000_000)
    requests = list[web.Request]()

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        requests.append(request)
        return await handler(request)

    app = web.Application(middlewares=[problems, watch], client_max_size=MOST_META)
    app[_TRAINING] = training = Training.__new__(Training)  # nobody hears of it
    app.router.add_post(STATES, _take_state)
    app.router.add_post(CLAIMS, _answer_claim)
    app.router.add_routes(Partials(lambda: training).routes())
    async with serving(app, "127.0.0.1", 0) as url, aiohttp.ClientSession() as http:
        headers = {"Content-Encoding": way}
        async with http.request(method, url + path.format(name="s"), data=bomb, headers=headers) as reply:
            assert reply.status == status
    assert requests[0].content.total_bytes <= len(bomb)
