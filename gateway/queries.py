"""The part of the API that only reads."""

import re
from typing import Final

import msgspec
from aiohttp import web

from fedota.contracts.commands import Download, IssuedToken, IssueToken, PresignDownload
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError
from fedota.events import CATALOGUE
from gateway.parts import (
    HEARTBEAT,
    IDENTITY,
    PARTS,
    SCHEME,
    STILL_IN,
    answer,
    command,
    file_name_of,
    organization_asked_for,
    organization_of,
    problem_id_of,
)
from gateway.people import PEOPLE
from gateway.reading import PAST_PROBLEMS, at_of, fresh, of_the_page, questions_of, reading
from gateway.reads import Row, is_problem_id, without_logs
from gateway.stream import Eyes, Filter, seen, send
from gateway.web_errors import moment, whole_number, wrong_parameter

_INT: Final = 2**31 - 1
_MOST: Final = 1000
_MOST_GIVEN: Final = 10  # rounds in a page of contributions: each has a row for every organization
_MOST_OWN: Final = 100  # the same of one organization's
_PERSON: Final = re.compile(r"(.+) \(([^()]+)\)", re.DOTALL)


@reading(of_the_page)
async def list_problems(request: web.Request) -> web.Response:
    """The problems, newest first; `next` is the `before` of the following page."""
    default, most = (200, _MOST) if at_of(request) is None else (PAST_PROBLEMS, PAST_PROBLEMS)
    limit = whole_number(request, "limit", default, most=most)
    found = await questions_of(request).problems(whole_number(request, "before", 2**62), limit)
    return answer({"problems": found, "next": found[-1]["position"] if limit and len(found) == limit else None})


@reading()
async def get_problem(request: web.Request) -> web.Response:
    """A problem with all that is known of it now."""
    reads, problem_id = questions_of(request), problem_id_of(request)
    problem = await reads.problem(problem_id)
    infrastructure = await reads.infrastructure(problem_id, problem["run"])
    files = await reads.files(problem_id)
    return answer({**problem, "files": files, "infrastructure": for_eyes_of(request, infrastructure)})


@reading()
async def list_files(request: web.Request) -> web.Response:
    """A problem's files."""
    problem = await _problem(request)
    return answer({"files": await questions_of(request).files(problem["problem_id"])})


@reading()
async def get_file(request: web.Request) -> web.Response:
    """Where to download a file from."""
    problem = await _problem(request)
    file = await questions_of(request).file(problem["problem_id"], file_name_of(request))
    download = await _download(request, problem["problem_id"], file["key"])
    return answer({"url": download.url, "seconds": download.seconds})


@reading()
async def list_participations(request: web.Request) -> web.Response:
    """Who takes part, or asked to."""
    problem = await _problem(request)
    return answer({"participations": await questions_of(request).participations(problem["problem_id"])})


@fresh
async def get_kit(request: web.Request) -> web.Response:
    """The join kit of an approved organization, as a download."""
    problem, organization = await _problem(request), organization_of(request)
    await _require_approved(request, problem["problem_id"], organization)
    infrastructure = await _running_infrastructure(request, problem)
    reply = await command(request, IssueToken(problem_id=problem["problem_id"], organization=organization))
    issued = msgspec.convert(reply.result, IssuedToken)
    kit = Kit(
        problem_id=problem["problem_id"],
        name=problem["name"],
        organization=organization,
        token=issued.token,
        selectors=infrastructure["selectors"],
        expires=issued.expires,
        authority=infrastructure.get("authority", ""),  # a read model from before has none until it is rebuilt
        page=f"{request.app[SCHEME]}://{request.host}/problems/{problem['problem_id']}",
    )
    response = answer(kit)
    file_name = organization.replace(" ", "-")
    response.headers["Content-Disposition"] = f'attachment; filename="fedota-kit-{file_name}.json"'
    return response


@reading()
async def get_infrastructure(request: web.Request) -> web.Response:
    """Coordinator and selectors of a run."""
    problem = await _problem(request)
    infrastructure = await questions_of(request).infrastructure(problem["problem_id"], _run(request, problem))
    return answer(for_eyes_of(request, infrastructure))


@reading()
async def list_rounds(request: web.Request) -> web.Response:
    """A run's rounds in order, each attempt a row; `next` is the `after` of the following page."""
    problem = await _problem(request)
    run, limit = _run(request, problem), max(1, whole_number(request, "limit", _MOST, most=_MOST))
    after = whole_number(request, "after", 0, most=_INT)
    rounds = await questions_of(request).rounds(problem["problem_id"], run, after=after, limit=limit)
    is_full = bool(rounds) and rounds[-1]["round"] == after + limit
    return answer({"run": run, "rounds": rounds, "next": after + limit if is_full else None})


@reading()
async def list_contributions(request: web.Request) -> web.Response:
    """What organizations gave to a run's rounds; whoever acts for one sees its own. Pages are as of `list_rounds`."""
    problem, organization = await _problem(request), organization_asked_for(request)
    problem_id, questions = problem["problem_id"], questions_of(request)
    most = _MOST_OWN if organization else _MOST_GIVEN
    run, limit = _run(request, problem), max(1, whole_number(request, "limit", most, most=most))
    after = whole_number(request, "after", 0, most=_INT)
    newest = await questions.newest_round(problem_id, run)  # before the rows: what comes meanwhile is on another page
    found = await questions.contributions(problem_id, run, organization, after=after, limit=limit)
    return answer({"run": run, "contributions": found, "next": after + limit if newest > after + limit else None})


@reading()
async def get_round(request: web.Request) -> web.Response:
    """One round: every attempt of it."""
    problem, number = await _problem(request), _round_number(request)
    run = _run(request, problem)
    questions, which = questions_of(request), {"after": number - 1, "limit": 1}
    attempts = await questions.rounds(problem["problem_id"], run, **which) if number else []
    if not attempts:
        raise FedotaError("not_found", f"Run {run} of this problem has no such round yet. Look at its rounds.")
    return answer({"run": run, "round": number, "attempts": attempts})


@reading()
async def get_checkpoint(request: web.Request) -> web.Response:
    """Where to download the checkpoint of a completed round from."""
    problem, number = await _problem(request), _round_number(request)
    run = _run(request, problem)
    checkpoint = await questions_of(request).checkpoint(problem["problem_id"], run, number)
    return await _checkpoint(request, problem["problem_id"], {"run": run, "round": number}, checkpoint)


@reading()
async def get_model(request: web.Request) -> web.Response:
    """Where to download the newest completed checkpoint from."""
    problem = await _problem(request)
    newest = await questions_of(request).newest_checkpoint(problem["problem_id"])
    if newest is None:
        raise FedotaError("problem_state", "No round has completed yet, so there is no model. Wait for the first one.")
    which = {"run": newest["run"], "round": newest["round"]}
    return await _checkpoint(request, problem["problem_id"], which, newest["checkpoint"])


@fresh
async def list_events(request: web.Request) -> web.Response:
    """The log past a position; `next` is the `after` to go on with, and stays the same at the end."""
    after, limit = whole_number(request, "after", 0), whole_number(request, "limit", 100, most=_MOST)
    wanted = await _wanted(request)
    if wanted.until is not None and wanted.until < after:
        raise wrong_parameter("until", f"it lies before `after`, at {after}: no position is between them")
    if wanted.since and wanted.before and wanted.before <= wanted.since:
        raise wrong_parameter("before", "it is not later than `since`: no time is between them")
    feed = request.app[PARTS].feed
    head = await feed.head()
    page = await feed.page(wanted, after, limit)
    eyes = _eyes_of(request)
    events = [msgspec.Raw(body) for body in await seen(page.items, lambda item: item.body(eyes))]
    return answer({"events": events, "next": page.reached, "head": head})


@fresh
async def get_event(request: web.Request) -> web.Response:
    """The event at one position of the log."""
    text, feed = request.match_info["position"], request.app[PARTS].feed
    if text == "stream":  # only HEAD comes here: what never ends has no beginning to look at
        raise web.HTTPMethodNotAllowed(request.method, ["GET"])
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise FedotaError("not_found", f"Positions count from 1; {text[:40]!r} is none. GET /api/events lists them.")
    item = await feed.event(int(text))
    if item is None:
        head = await feed.head()
        raise FedotaError("position_not_reached", f"The log has reached position {head}, not {text}.")
    return answer(msgspec.Raw(item.body(_eyes_of(request))))


async def stream_events(request: web.Request) -> web.StreamResponse:
    """The log past a position, live."""
    for name in ("until", "before", "at"):
        if name in request.query:
            raise wrong_parameter(name, "the stream has no end; GET /api/events gives what lies between two places")
    after = whole_number(request, "after", 0)
    if (last := request.headers.get("Last-Event-ID", "")).isascii() and last.isdecimal() and len(last) < 19:
        after = int(last)
    batches = request.app[PARTS].feed.follow(await _wanted(request), after, request.app[HEARTBEAT])
    return await send(request, batches, eyes=_eyes_of(request), welcome=request[STILL_IN])


def _eyes_of(request: web.Request) -> Eyes:
    return Eyes(logs=_sees_logs(request), organization=request[IDENTITY].organization)


def _sees_logs(request: web.Request) -> bool:
    return request[IDENTITY].may("read_infrastructure_log")


async def _problem(request: web.Request) -> Row:
    return await questions_of(request).problem(problem_id_of(request))


def _run(request: web.Request, problem: Row) -> int:
    return whole_number(request, "run", problem["run"], most=_INT)


async def _wanted(request: web.Request) -> Filter:
    problem_id, types = request.query.get("problem"), tuple(request.query.getall("type", ())) or None
    if problem_id is not None and not is_problem_id(problem_id):
        raise wrong_parameter("problem", "expected a problem's id, a UUID")
    if unknown := set(types or ()) - set(CATALOGUE):
        raise wrong_parameter("type", f"there is no event type {min(unknown)[:40]!r}; docs/api.md lists them")
    return Filter(
        problem_id,
        types,
        actor=await _actor(request) if "actor" in request.query else None,
        until=whole_number(request, "until", 0) if "until" in request.query else None,
        since=moment(request, "since"),
        before=moment(request, "before"),
    )


async def _actor(request: web.Request) -> str:
    """The actor as the log has it; a person goes by name, or by name and standing as events show it."""
    wanted = request.query["actor"]
    if "\0" in wanted:
        raise wrong_parameter("actor", "no actor has the character U+0000 in its name")
    name, standing = match.groups() if (match := _PERSON.fullmatch(wanted)) else (wanted, None)
    known = await request.app[PEOPLE].actors_of(name)
    found = [actor for actor in known if standing in (None, actor.partition("~")[0])]
    if len(found) > 1:
        standings = ", ".join(f"{name} ({actor.partition('~')[0]})" for actor in found)
        raise wrong_parameter("actor", f"{name[:100]} acted in more than one role; ask for one of: {standings}")
    return found[0] if found else wanted


def for_eyes_of(request: web.Request, infrastructure: Row) -> Row:
    """The infrastructure of a run as whoever asks may see it."""
    return infrastructure if _sees_logs(request) else without_logs(infrastructure)


async def _download(request: web.Request, problem_id: str, key: str) -> Download:
    reply = await command(request, PresignDownload(problem_id=problem_id, key=key))
    return msgspec.convert(reply.result, Download)


async def _checkpoint(request: web.Request, problem_id: str, which: Row, checkpoint: Row) -> web.Response:
    download = await _download(request, problem_id, checkpoint["key"])
    return answer({"url": download.url, "seconds": download.seconds, **which, **checkpoint})


def _round_number(request: web.Request) -> int:
    """The round in the address; 0 when nothing could have that number."""
    text = request.match_info["round"]
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


async def _require_approved(request: web.Request, problem_id: str, organization: str) -> None:
    participation = await questions_of(request).participation(problem_id, organization)
    if participation["state"] != "approved":
        because = f" ({participation['reason']})" if participation["reason"] else ""
        raise FedotaError(
            "participation_state",
            f"The participation of {organization} is {participation['state']}{because}. "
            "The kit is there once the setter has approved it.",
        )


async def _running_infrastructure(request: web.Request, problem: Row) -> Row:
    infrastructure: Row = await questions_of(request).infrastructure(problem["problem_id"], problem["run"])
    if problem["state"] == "running" and infrastructure["state"] in ("running", "degraded"):
        return infrastructure
    raise FedotaError(
        "problem_state",
        f"The problem is {problem['state']} and its infrastructure is {infrastructure['state']}, so there are no "
        "selectors to name in the kit. Fetch it again when the setter has started the problem.",
    )
