"""Which state of the read model a request asks for: now, at least at a position, or as of one.

`?at_least=<position>` waits until the read model stands for that position; `?at=<position>` shows what it was there,
worked out from the log. The answer's header `Fedota-Position` says which position it stands for.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Final

from aiohttp import web

from gateway.parts import POSITION_HEADER, problem_id_of, reads_of
from gateway.reads import Questions
from gateway.web_errors import Handler, whole_number, wrong_parameter

QUESTIONS: Final = web.RequestKey("questions", Questions)
PAST_PROBLEMS: Final = 20  # of a list in the past; each is worked out from all its events
Problems = Callable[[web.Request, int], Awaitable[list[str]]]


async def of_its_address(request: web.Request, _: int) -> list[str]:
    """The problem that the address names."""
    return [problem_id_of(request)]


async def of_the_page(request: web.Request, at: int) -> list[str]:
    """Those of the page of problems that is asked for, of those published up to a position."""
    reads = reads_of(request)
    await reads.at_least(at)
    before = min(at + 1, whole_number(request, "before", at + 1))
    return await reads.published(before, whole_number(request, "limit", PAST_PROBLEMS, most=PAST_PROBLEMS))


def reading(problems: Problems = of_its_address) -> Callable[[Handler], Handler]:
    """Make a handler a read: `questions_of` then answers from the state that is asked for.

    `problems` says which problems a look into the past has to work out.
    """

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def read(request: web.Request) -> web.StreamResponse:
            async with _state(request, problems) as questions:
                request[QUESTIONS] = questions
                position = questions.position  # before the rows are read: they show all of it, perhaps more
                response = await handler(request)
            response.headers.setdefault(POSITION_HEADER, str(position))
            return response

        return read

    return decorate


def fresh(handler: Handler) -> Handler:
    """Make a handler a read of what is there now: it waits for `?at_least=<position>`, and refuses `?at`."""

    @wraps(handler)
    async def read(request: web.Request) -> web.StreamResponse:
        if "at" in request.query:
            raise wrong_parameter("at", "this is told as it is now, not as it was; leave `at` out")
        reads = await _now(request)
        request[QUESTIONS] = reads
        position = reads.position
        response = await handler(request)
        response.headers.setdefault(POSITION_HEADER, str(position))
        return response

    return read


def questions_of(request: web.Request) -> Questions:
    """The state of the read model that this request asks for."""
    return request[QUESTIONS]


def at_of(request: web.Request) -> int | None:
    """The position in the past that is asked for; None for now."""
    return whole_number(request, "at", 0) if "at" in request.query else None


@asynccontextmanager
async def _state(request: web.Request, problems: Problems) -> AsyncIterator[Questions]:
    at = at_of(request)
    if at is None:
        yield await _now(request)
        return
    if "at_least" in request.query:
        raise wrong_parameter("at", "`at` asks for the past and `at_least` for now; send one of them")
    reads = reads_of(request)
    await reads.require_reached(at)
    async with reads.as_of(at, await problems(request, at)) as questions:
        yield questions


async def _now(request: web.Request) -> Questions:
    reads = reads_of(request)
    await reads.at_least(whole_number(request, "at_least", 0))
    return reads
