"""What operators ask of the processes that keep projections: how far they are, rebuild, verify, dead letters.

Each process answers for its own projection (`fedota.contracts.operations`); the gateway passes questions on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
from aiohttp import web

from fedota.contracts import subjects
from fedota.contracts.operations import DeadLetter, DeadLetterRequest, DeadLetters, ProjectionStatus, Retried, WorkKind
from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.kernel.migrations import PROJECTING
from gateway.parts import PARTS, actor_of, answer
from gateway.web_errors import body_of

T = TypeVar("T")
_LOOK: Final = 3.0  # seconds that a process has to say how it is
_WORK: Final = 30.0  # seconds that it has to handle a dead letter


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request that says all by its address."""


async def list_projections(request: web.Request) -> web.Response:
    """How far each projection is; `unavailable` names the processes that do not answer."""
    told, silent = await _all_who_answer(request, PROJECTING, _status)
    return answer({"projections": told, "unavailable": silent})


async def get_projection(request: web.Request) -> web.Response:
    """How far one projection is, and its rebuild or verification."""
    return answer(await _status(request, _process_of(request)))


async def rebuild_projection(request: web.Request) -> web.Response:
    """Begin to build a read model anew beside the live one, which it then takes the place of."""
    return await _begin(request, "rebuild")


async def verify_projection(request: web.Request) -> web.Response:
    """Begin to compare a read model with a fresh rebuild, row by row."""
    return await _begin(request, "verify")


async def list_dead_letters(request: web.Request) -> web.Response:
    """The dead letters of every process, or of `?process=`; `unavailable` names the processes that do not answer."""
    process = request.query.get("process")
    asked = PROJECTING if process is None else (_known(process),)
    told, silent = await _all_who_answer(request, asked, _dead_letters)
    if process is not None and silent:
        raise _silent(process)
    return answer({"dead_letters": [row for rows in told for row in rows], "unavailable": silent})


async def get_dead_letter(request: web.Request) -> web.Response:
    """One dead letter: why it is one, its event, and those of its stream that are parked behind it."""
    process, position = _process_of(request), _position_of(request)
    letters = await _dead_letters(request, process)
    letter = next((row for row in letters if row["position"] == position), None)
    if letter is None:
        raise FedotaError(
            "not_found",
            f"The event at position {position} is no dead letter of {process}. GET /api/deadletters lists them.",
        )
    behind = [row for row in letters if row["subject"] == letter["subject"] and row["position"] > position]
    item = await request.app[PARTS].feed.event(position)
    event = msgspec.Raw(item.full) if item else None
    return answer({**letter, "event": event, "behind": [row for row in behind if row["state"] == "parked"]})


async def retry_dead_letter(request: web.Request) -> web.Response:
    """Handle the parked events of that one's stream again, in order; what is handled is no dead letter any more."""
    return answer(await _about_letter(request, "retry", Retried))


async def drop_dead_letter(request: web.Request) -> web.Response:
    """Give one event up: it never has an effect in this projection. To drop it again changes nothing."""
    return answer(await _about_letter(request, "drop", DeadLetter))


async def _begin(request: web.Request, kind: WorkKind) -> web.Response:
    await body_of(request, _Nothing)
    process = _process_of(request)
    try:
        status = await _ask(request, process, kind, {"actor": await actor_of(request)}, ProjectionStatus, _LOOK)
    except FedotaError as error:
        if error.problem.code != "conflict":
            raise
        status = await _status(request, process)
        if status.work is None or status.work.finished is not None or status.work.kind != kind:
            raise  # something else is being worked on
    return answer(status, status=202, location=f"/api/projections/{process}")


async def _about_letter(request: web.Request, name: str, kind: type[T]) -> T:
    await body_of(request, _Nothing)
    about = DeadLetterRequest(position=_position_of(request), actor=await actor_of(request))
    return await _ask(request, _process_of(request), name, about, kind, _WORK)


async def _status(request: web.Request, process: str) -> ProjectionStatus:
    return await _ask(request, process, "status", {}, ProjectionStatus, _LOOK)


async def _dead_letters(request: web.Request, process: str) -> list[dict[str, Any]]:
    letters = await _ask(request, process, "dead_letters", {}, DeadLetters, _LOOK)
    return [{"process": process, **msgspec.to_builtins(letter)} for letter in letters.dead_letters]


async def _ask(request: web.Request, process: str, name: str, body: Any, kind: type[T], seconds: float) -> T:
    """One question to one process. Raises its own refusals, or `unavailable` when it does not answer."""
    bus = request.app[PARTS].bus
    try:
        reply = await bus.ask(subjects.operation(process, name), to_json(body), seconds)
    except nats.errors.Error:  # nobody is there, or not in time, or NATS itself has gone
        raise _silent(process) from None
    return msgspec.json.decode(reply, type=kind)


async def _all_who_answer(
    request: web.Request, processes: Sequence[str], look: Callable[[web.Request, str], Awaitable[T]]
) -> tuple[list[T], list[str]]:
    """What each says, and who does not answer: one process that is down must not hide how the others are."""
    replies = await asyncio.gather(*(look(request, name) for name in processes), return_exceptions=True)
    told: list[T] = []
    silent: list[str] = []
    for name, reply in zip(processes, replies, strict=True):
        if isinstance(reply, FedotaError) and reply.problem.status in (503, 504):
            silent.append(name)
        elif isinstance(reply, BaseException):
            raise reply
        else:
            told.append(reply)
    return told, silent


def _silent(process: str) -> FedotaError:
    return FedotaError(
        "unavailable",
        f"The process {process} does not answer. See that it runs (its own /readyz, its log), and ask again.",
        retry_after=2,
    )


def _process_of(request: web.Request) -> str:
    return _known(request.match_info["process"])


def _known(process: str) -> str:
    if process not in PROJECTING:
        names = ", ".join(sorted(PROJECTING))
        raise FedotaError("not_found", f"No process {process[:40]!r} keeps a projection. Those that do: {names}.")
    return process


def _position_of(request: web.Request) -> int:
    text = request.match_info["position"]
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise FedotaError("not_found", f"Positions count from 1; {text[:40]!r} is none.")
    return int(text)
