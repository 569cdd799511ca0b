"""The anchor of idle clients: a bare aiohttp handler that holds requests, `python -m benchmarks.bare PORT`.

It knows clients by a header and does nothing else: no token is checked, nobody is told.
"""

import asyncio
import sys
from contextlib import suppress
from typing import Final

import uvloop
from aiohttp import web

_HOLD: Final = 25.0  # seconds
_waiters: Final[dict[str, "asyncio.Future[None]"]] = {}


async def check_in(request: web.Request) -> web.Response:
    """Hold a client until it comes again, or for so long."""
    name = request.headers["Fedota-Client"]
    if (before := _waiters.get(name)) is not None and not before.done():
        before.set_result(None)
    waiter = _waiters[name] = asyncio.get_running_loop().create_future()
    with suppress(TimeoutError):
        async with asyncio.timeout(_HOLD):
            await waiter
    if _waiters.get(name) is waiter:
        del _waiters[name]
    return web.json_response({"status": "come_back", "seconds": 0})


async def metrics(_: web.Request) -> web.Response:
    """How many wait, in the words of a selector."""
    return web.Response(text=f"fedota_clients_waiting {len(_waiters)}\n")


async def _serve(port: int) -> None:
    app = web.Application()
    app.add_routes([web.post("/v1/check-in", check_in), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
