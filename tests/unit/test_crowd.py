"""The benchmarks' light clients."""

from aiohttp import web

from benchmarks.crowd import Line
from fedota.process import serving


async def test_a_line_keeps_its_connection() -> None:
    """Else clients that wait would be measured as clients that connect, over TLS by a handshake for each check-in."""
    connections = set()

    async def here(request: web.Request) -> web.Response:
        connections.add(request.transport)
        return web.json_response({"status": "come_back"})

    app = web.Application()
    app.router.add_post("/", here)
    async with serving(app, "127.0.0.1", 0) as url:
        line = Line(url, "none", "client")
        for _ in range(3):
            assert (await line.ask("POST", "/")).status == 200
        line.close()
    assert len(connections) == 1
