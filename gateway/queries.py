"""The part of the API that only reads."""

from functools import wraps
from typing import Any, Final

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
    STILL_IN,
    answer,
    command,
    file_name_of,
    organization_of,
    problem_id_of,
    reads_of,
)
from gateway.reads import Row, is_problem_id, without_logs
from gateway.stream import Filter, send
from gateway.web_errors import Handler, whole_number

_INT: Final = 2**31 - 1
_MOST: Final = 1000


def fresh(handler: Handler) -> Handler:
    """Make a read wait until the read model stands for `?at_least=<position>`."""

    @wraps(handler)
    async def waiting(request: web.Request) -> web.StreamResponse:
        await reads_of(request).at_least(whole_number(request, "at_least", 0))
        return await handler(request)

    return waiting


@fresh
async def list_problems(request: web.Request) -> web.Response:
    """The problems, newest first; `next` is the `before` of the following page."""
    limit = whole_number(request, "limit", 200, most=_MOST)
    found = await reads_of(request).problems(whole_number(request, "before", 2**62), limit)
    return answer({"problems": found, "next": found[-1]["position"] if limit and len(found) == limit else None})


@fresh
async def get_problem(request: web.Request) -> web.Response:
    """A problem with all that is known of it now."""
    reads, problem_id = reads_of(request), problem_id_of(request)
    problem = await reads.problem(problem_id)
    infrastructure = await reads.infrastructure(problem_id, problem["run"])
    files = await reads.files(problem_id)
    return answer({**problem, "files": files, "infrastructure": for_eyes_of(request, infrastructure)})


@fresh
async def list_files(request: web.Request) -> web.Response:
    """A problem's files."""
    problem = await _problem(request)
    return answer({"files": await reads_of(request).files(problem["problem_id"])})


@fresh
async def get_file(request: web.Request) -> web.Response:
    """Where to download a file from."""
    problem = await _problem(request)
    file = await reads_of(request).file(problem["problem_id"], file_name_of(request))
    download = await _download(request, problem["problem_id"], file["key"])
    return answer({"url": download.url, "seconds": download.seconds})


@fresh
async def list_participations(request: web.Request) -> web.Response:
    """Who takes part, or asked to."""
    problem = await _problem(request)
    return answer({"participations": await reads_of(request).participations(problem["problem_id"])})


@fresh
async def get_kit(request: web.Request) -> web.Response:
    """The join kit of an approved organization, as a download."""
    problem, organization = await _problem(request), organization_of(request)
    await _require_approved(request, problem["problem_id"], organization)
    selectors = await _running_selectors(request, problem)
    reply = await command(request, IssueToken(problem_id=problem["problem_id"], organization=organization))
    issued = msgspec.convert(reply.result, IssuedToken)
    kit = Kit(
        problem_id=problem["problem_id"],
        name=problem["name"],
        organization=organization,
        token=issued.token,
        selectors=selectors,
        expires=issued.expires,
    )
    response = answer(kit)
    file_name = organization.replace(" ", "-")
    response.headers["Content-Disposition"] = f'attachment; filename="fedota-kit-{file_name}.json"'
    return response


@fresh
async def get_infrastructure(request: web.Request) -> web.Response:
    """Coordinator and selectors of a run."""
    problem = await _problem(request)
    infrastructure = await reads_of(request).infrastructure(problem["problem_id"], _run(request, problem))
    return answer(for_eyes_of(request, infrastructure))


@fresh
async def list_rounds(request: web.Request) -> web.Response:
    """A run's rounds in order, each attempt a row; `next` is the `after` of the following page."""
    problem = await _problem(request)
    run, limit = _run(request, problem), max(1, whole_number(request, "limit", _MOST, most=_MOST))
    after = whole_number(request, "after", 0, most=_INT)
    rounds = await reads_of(request).rounds(problem["problem_id"], run, after=after, limit=limit)
    is_full = bool(rounds) and rounds[-1]["round"] == after + limit
    return answer({"run": run, "rounds": rounds, "next": after + limit if is_full else None})


@fresh
async def get_round(request: web.Request) -> web.Response:
    """One round: every attempt of it."""
    problem, number = await _problem(request), _round_number(request)
    run = _run(request, problem)
    attempts = await reads_of(request).rounds(problem["problem_id"], run, after=number - 1, limit=1) if number else []
    if not attempts:
        raise FedotaError("not_found", f"Run {run} of this problem has no such round yet. Look at its rounds.")
    return answer({"run": run, "round": number, "attempts": attempts})


@fresh
async def get_checkpoint(request: web.Request) -> web.Response:
    """Where to download the checkpoint of a completed round from."""
    problem, number = await _problem(request), _round_number(request)
    run = _run(request, problem)
    checkpoint = await reads_of(request).checkpoint(problem["problem_id"], run, number)
    return await _checkpoint(request, problem["problem_id"], {"run": run, "round": number}, checkpoint)


@fresh
async def get_model(request: web.Request) -> web.Response:
    """Where to download the newest completed checkpoint from."""
    problem = await _problem(request)
    newest = await reads_of(request).newest_checkpoint(problem["problem_id"])
    if newest is None:
        raise FedotaError("problem_state", "No round has completed yet, so there is no model. Wait for the first one.")
    which = {"run": newest["run"], "round": newest["round"]}
    return await _checkpoint(request, problem["problem_id"], which, newest["checkpoint"])


@fresh
async def list_events(request: web.Request) -> web.Response:
    """The log past a position; `next` is the `after` of the following page."""
    after, limit = whole_number(request, "after", 0), whole_number(request, "limit", 100, most=_MOST)
    items = await request.app[PARTS].feed.page(_wanted(request), after, limit)
    logs = request[IDENTITY].may("read_infrastructure_log")
    events = [msgspec.Raw(item.full if logs else item.public) for item in items]
    return answer({"events": events, "next": items[-1].position if items else after})


async def stream_events(request: web.Request) -> web.StreamResponse:
    """The log past a position, live."""
    after = whole_number(request, "after", 0)
    if (last := request.headers.get("Last-Event-ID", "")).isascii() and last.isdecimal() and len(last) < 19:
        after = int(last)
    batches = request.app[PARTS].feed.follow(_wanted(request), after, request.app[HEARTBEAT])
    logs = request[IDENTITY].may("read_infrastructure_log")
    return await send(request, batches, logs=logs, welcome=request[STILL_IN])


async def _problem(request: web.Request) -> Row:
    return await reads_of(request).problem(problem_id_of(request))


def _run(request: web.Request, problem: Row) -> int:
    return whole_number(request, "run", problem["run"], most=_INT)


def _wanted(request: web.Request) -> Filter:
    problem_id, types = request.query.get("problem"), tuple(request.query.getall("type", ())) or None
    if problem_id is not None and not is_problem_id(problem_id):
        raise FedotaError("invalid_field", "problem: it is not a problem's id.", fields={"problem": "expected a UUID"})
    if unknown := set(types or ()) - set(CATALOGUE):
        what = f"there is no event type {min(unknown)[:40]!r}"
        raise FedotaError("invalid_field", f"type: {what}. docs/api.md lists them.", fields={"type": what})
    return Filter(problem_id, types)


def for_eyes_of(request: web.Request, infrastructure: Row) -> Row:
    """The infrastructure of a run as whoever asks may see it."""
    return infrastructure if request[IDENTITY].may("read_infrastructure_log") else without_logs(infrastructure)


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
    participation = await reads_of(request).participation(problem_id, organization)
    if participation["state"] != "approved":
        because = f" ({participation['reason']})" if participation["reason"] else ""
        raise FedotaError(
            "participation_state",
            f"The participation of {organization} is {participation['state']}{because}. "
            "The kit is there once the setter has approved it.",
        )


async def _running_selectors(request: web.Request, problem: Row) -> list[str]:
    infrastructure: dict[str, Any] = await reads_of(request).infrastructure(problem["problem_id"], problem["run"])
    if problem["state"] == "running" and infrastructure["state"] in ("running", "degraded"):
        return list(infrastructure["selectors"])
    raise FedotaError(
        "problem_state",
        f"The problem is {problem['state']} and its infrastructure is {infrastructure['state']}, so there are no "
        "selectors to name in the kit. Fetch it again when the setter has started the problem.",
    )
