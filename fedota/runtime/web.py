"""What coordinator and selector share of HTTP: errors in words, and the key between them."""

import hmac
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from fedota.errors import FedotaError, Problem, problem_json
from fedota.events import to_json
from fedota.runtime.protocol import OFFSET
from fedota.runtime.receiving import finish

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = structlog.get_logger(__name__)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever goes wrong into problem+json; the text of an unforeseen error stays in the log."""
    response = await _answered(request, handler)
    finish(request, response)
    return response


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except FedotaError as error:
        return problem_response(error.problem)
    except web.HTTPNotFound:
        return problem_response(FedotaError("not_found", f"There is nothing at {request.path}.").problem)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return problem_response(FedotaError("method_not_allowed", f"{request.path} answers {allowed}.").problem)
    except web.HTTPRequestEntityTooLarge:
        return problem_response(FedotaError("too_large", "The body is larger than this address takes.").problem)
    except web.HTTPException:
        raise
    except Exception as error:
        if isinstance(error, ConnectionError) and _is_gone(request):
            return web.Response(status=503)  # aiohttp wants something to send, and would log the whole way to the error
        _log.exception("request failed", method=request.method, path=request.path)
        return problem_response(FedotaError("internal_error", "The request failed; our log says why.").problem)


def _is_gone(request: web.Request) -> bool:
    """Whether it is the client's own connection that broke, which is no error of ours."""
    return request.transport is None or request.transport.is_closing()


def problem_response(problem: Problem) -> web.Response:
    """The RFC 9457 response."""
    response = web.Response(
        status=problem.status, body=to_json(problem_json(problem)), content_type="application/problem+json"
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="Fedota"'
    return response


def goes_on_at(offset: int, said: str) -> web.Response:
    """The answer to a body that goes on elsewhere than it broke off; `said` has a place for the bytes that are here."""
    detail = f"{said.format(offset)} Send what comes after them."
    response = problem_response(FedotaError("offset_mismatch", detail).problem)
    response.headers[OFFSET] = str(offset)
    return response


def json_response(value: object, headers: dict[str, str] | None = None) -> web.Response:
    """A struct as JSON."""
    return web.Response(body=to_json(value), content_type="application/json", headers=headers)


def bearer(request: web.Request) -> str:
    """The token that a request carries; empty when it carries none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def require_key(request: web.Request, key: str) -> None:
    """Raise unless the request carries the key that coordinator and selectors share."""
    if not hmac.compare_digest(bearer(request).encode(), key.encode()):
        raise FedotaError("unauthenticated", "Only this problem's selectors talk to its coordinator.")
