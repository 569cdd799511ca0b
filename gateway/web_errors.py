"""Every error that leaves the gateway is problem+json, and nothing else leaves it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec
import structlog
from aiohttp import web

from fedota.errors import FedotaError, Problem, problem_json
from fedota.events import to_json
from fedota.kernel.bus import invalid_field

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
B = TypeVar("B")
BODY_LIMIT: Final = 1024 * 1024
_PATIENCE: Final = 60.0  # seconds for a whole body: 17 KiB a second at the slowest. Files go to the object store.
_Moment = Annotated[datetime, msgspec.Meta(tz=True)]
_log = structlog.get_logger(__name__)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever goes wrong into problem+json; the text of an unforeseen error stays in the log."""
    try:
        return await handler(request)
    except FedotaError as error:
        return problem_response(error.problem)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return problem_response(_of_http(request, error).problem, _allow(error))
    except ConnectionError:
        raise  # the caller has gone: there is nobody to tell
    except Exception:
        _log.exception("request failed", method=request.method, path=request.path)
        return problem_response(FedotaError("internal_error", "The request failed; our log says why.").problem)


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> web.Response:
    """The RFC 9457 response."""
    response = web.Response(
        status=problem.status,
        body=to_json(problem_json(problem)),
        content_type="application/problem+json",
        headers=headers,
    )
    if problem.retry_after is not None or problem.status == 503:
        response.headers["Retry-After"] = str(problem.retry_after or 1)
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="Fedota"'
    return response


def _of_http(request: web.Request, error: web.HTTPException) -> FedotaError:
    match error:
        case web.HTTPNotFound():
            return FedotaError("not_found", f"There is nothing at {_place(request)}. docs/api.md lists what there is.")
        case web.HTTPForbidden():  # a folder of static files
            return FedotaError("not_found", f"There is nothing to read at {_place(request)}.")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return FedotaError("method_not_allowed", f"{_place(request)} answers {allowed}, not {request.method}.")
        case web.HTTPRequestEntityTooLarge():
            return FedotaError("too_large", f"A body may have at most {BODY_LIMIT} bytes. Files go to upload slots.")
        case _:
            return FedotaError("invalid_request", f"The request was refused: {error.reason}.")


def _place(request: web.Request) -> str:
    """The address as it may be repeated: bounded, and without the bytes that no text can hold."""
    return request.path.encode("utf-8", "replace").decode()[:200]


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": ", ".join(sorted(error.allowed_methods))} if isinstance(error, web.HTTPMethodNotAllowed) else {}


def require_plain(request: web.Request) -> None:
    """Refuse a body that would have to be unpacked first: 50 kB can hide 50 MB."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FedotaError("unsupported_encoding", "Send the body as it is, without Content-Encoding.")


async def in_time(reading: Awaitable[B]) -> B:
    """What a request's body is read as. Raises `timeout`: who sends half of one must not hold a connection for ever."""
    try:
        async with asyncio.timeout(_PATIENCE):
            return await reading
    except TimeoutError:
        said = f"The request's body did not come within {_PATIENCE:.0f} seconds. Nothing was done; send it again."
        raise FedotaError("timeout", said) from None


async def body_of(request: web.Request, kind: type[B], **address: str) -> B:
    """The request's JSON body, checked against `kind`; an empty body is an empty object.

    `address` are the fields that the request's address gives: the body must leave them out.
    """
    require_plain(request)
    body = await in_time(request.read()) or b"{}"
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        json.loads(body, object_pairs_hook=_unambiguous)
        if twice := fields.keys() & address.keys():
            raise msgspec.ValidationError(f"Object contains unknown field `{min(twice)}`")
        return msgspec.convert({**fields, **address}, kind)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FedotaError("invalid_request", f"The body is not JSON: {error}. Send a JSON object.") from None
    except RecursionError:
        raise FedotaError("invalid_request", "The body is nested too deeply. Send a flatter JSON object.") from None


def _unambiguous(pairs: list[tuple[str, Any]]) -> None:
    """Refuse what two readers would read differently: a field that is there twice, or the character U+0000."""
    seen = set()
    for name, value in pairs:
        if name in seen:
            what = "the field is there twice"
        elif "\0" in name or (isinstance(value, str) and "\0" in value):
            what = "it holds the character U+0000"
        else:
            seen.add(name)
            continue
        raise FedotaError("invalid_field", f"{name}: {what}. Correct it and send it again.", fields={name: what})


def whole_number(request: web.Request, name: str, default: int, most: int = 2**62) -> int:
    """A query parameter that counts something, at most `most`."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise wrong_parameter(name, f"expected a whole number, got {text[:40]!r}")
    return min(int(text), most)


def moment(request: web.Request, name: str) -> datetime | None:
    """A query parameter that is a time, as RFC 3339 writes it; None when it is not there."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return msgspec.convert(text, _Moment).astimezone(UTC)
    except (msgspec.ValidationError, OverflowError):  # in UTC it may lie before the year 1, or after 9999
        example = "expected a time like 2026-11-24T10:30:00Z (RFC 3339; in an address the + of an offset is %2B)"
        raise wrong_parameter(name, f"{example}, got {text[:40]!r}") from None


def wrong_parameter(name: str, what: str) -> FedotaError:
    """The refusal of a query parameter, and why."""
    return FedotaError("invalid_field", f"{name}: {what}.", fields={name: what})
