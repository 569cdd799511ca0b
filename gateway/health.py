"""What the gateway's open health route keeps to itself."""

import msgspec
import structlog
from aiohttp import web

from fedota.events import to_json
from gateway.web_errors import Handler

_log = structlog.get_logger(__name__)


@web.middleware
async def reasons_stay_here(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let `/readyz` say which checks fail; why may name inner addresses, and stands in the log."""
    response = await handler(request)
    if request.path != "/readyz" or not isinstance(response, web.Response) or response.status != 503:
        return response
    assert isinstance(response.body, bytes)
    body = msgspec.json.decode(response.body)
    _log.warning("not ready", failing=body["failing"])
    shown = {**body, "failing": dict.fromkeys(body["failing"], "failing; the gateway's log says why")}
    return web.Response(status=503, body=to_json(shown), content_type="application/json")
