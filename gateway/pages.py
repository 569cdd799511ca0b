"""The web pages: rendered here, kept up to date by the module in `static/live.js`."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import jinja2
import msgspec
from aiohttp import web

from fedota.errors import FedotaError
from fedota.events import CATALOGUE
from gateway.auth import Identity, digest_of
from gateway.parts import IDENTITY, PARTS, problem_id_of, reads_of
from gateway.queries import for_eyes_of
from gateway.reading import at_of, fresh, questions_of, reading
from gateway.reads import Row
from gateway.sessions import Sessions
from gateway.web_errors import Handler, in_time, require_plain, whole_number

_SHOWN_PROBLEMS: Final = 200
_SHOWN_ATTEMPTS: Final = 100
_SHOWN_EVENTS: Final = 60
_SHOWN_CONTRIBUTIONS: Final = 60
_FORM_LIMIT: Final = 4096
# where signing in may lead: our own pages only
_PLACE: Final = re.compile(r"/(?:problems/[0-9a-f-]{36}(?:\?at=\d{1,18})?)?")
_COUNTED_STAGES: Final = {"selection": "waiting", "configuration": "selected"}


class Past(NamedTuple):
    """What a page of the past says of itself: its position, when that was, and where one can go from it."""

    position: int
    time: datetime | None
    said: str
    earlier: int | None
    later: int | None


class Entrance(NamedTuple):
    """What signing in needs: whose token has a digest, and who is signed in."""

    whose: Callable[[str], Identity | None]
    sessions: Sessions


ENTRANCE: Final = web.AppKey("entrance", Entrance)
TEMPLATES: Final = web.AppKey("templates", jinja2.Environment)


def load_templates(uploads: bool) -> jinja2.Environment:
    """The templates; a name that the code did not give them is an error. `uploads`: whether pages may send files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gateway"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "moment": _moment,
        "share": _share,
        "short": _short,
        "points": _points,
        "progress": progress,
    }
    environment.globals |= {"event_types": " ".join(CATALOGUE), "uploads": uploads}
    return environment


@fresh
async def show_problems(request: web.Request) -> web.Response:
    """All problems, each with its state and latest round."""
    reads = reads_of(request)
    position = reads.position  # before the rows are read: what comes meanwhile is shown again, not missed
    before = whole_number(request, "before", 2**62)
    problems = await reads.problems(before, _SHOWN_PROBLEMS)
    older = problems[-1]["position"] if len(problems) == _SHOWN_PROBLEMS else None
    here = f"/?before={before}" if "before" in request.query else "/"
    return _page(request, "problems.html", position=position, problems=problems, older=older, here=here)


@reading()
async def show_problem(request: web.Request) -> web.Response:
    """One problem, live; or as it was at a position of the log, to be looked at only."""
    reads, problem_id = questions_of(request), problem_id_of(request)
    position = reads.position
    problem = await reads.problem(problem_id)
    participations = await reads.participations(problem_id)
    rounds = await reads.last_rounds(problem_id, problem["run"], _SHOWN_ATTEMPTS)
    return _page(
        request,
        "problem.html",
        position=position,
        past=await _past(request, problem_id),
        problem=problem,
        files=await reads.files(problem_id),
        participations=participations,
        taking_part={row["organization"] for row in participations if row["state"] in ("requested", "approved")},
        has_checkpoint=await reads.newest_checkpoint(problem_id) is not None,
        infrastructure=for_eyes_of(request, await reads.infrastructure(problem_id, problem["run"])),
        rounds=rounds,
        progress=progress(rounds[0]) if rounds else None,
        metrics=sorted({name for row in rounds for name in row["metrics"]}),
        curves=await reads.curves(problem_id, problem["run"]),
        contributions=await reads.last_contributions(
            problem_id, problem["run"], request[IDENTITY].organization, _SHOWN_CONTRIBUTIONS
        ),
        feed=await reads.feed(problem_id, _SHOWN_EVENTS),
    )


async def _past(request: web.Request, problem_id: str) -> Past | None:
    at = at_of(request)
    if at is None:
        return None
    item = await request.app[PARTS].feed.event(at)
    earlier, later = await reads_of(request).around(problem_id, at)
    newest = await questions_of(request).feed(problem_id, 1)
    said = newest[0]["said"] if newest and newest[0]["position"] == at else ""
    return Past(at, item.time if item else None, said, earlier, later)


async def show_sign_in(request: web.Request) -> web.Response:
    """Where a token is pasted."""
    return _sign_in_page(request, wanted=request.query.get("next", "/"))


async def sign_in(request: web.Request) -> web.Response:
    """Trade a token for a session."""
    form = await _form(request)
    wanted = str(form.get("next", "/"))
    whose, sessions = request.app[ENTRANCE]
    digest = digest_of(str(form.get("token", "")).strip())
    if whose(digest) is None:
        refusal = "This token is not known here. Paste it whole, or ask the operator for a new one."
        return _sign_in_page(request, wanted=wanted, refusal=refusal, status=401)
    response = _see(wanted if _PLACE.fullmatch(wanted) else "/")
    sessions.start(request, response, digest)
    return response


async def _form(request: web.Request) -> Mapping[str, object]:
    """The form that a browser sends. Anybody may send one: it is small and plain, or not read."""
    require_plain(request)
    what = FedotaError("invalid_request", "Signing in takes a form: application/x-www-form-urlencoded, in UTF-8.")
    if request.content_type != "application/x-www-form-urlencoded" or request.charset not in (None, "utf-8"):
        raise what
    if request.content_length is None or request.content_length > _FORM_LIMIT:
        raise FedotaError("too_large", f"The form may have at most {_FORM_LIMIT} bytes, and says how many it has.")
    try:
        return await in_time(request.post())
    except UnicodeDecodeError:
        raise what from None


async def sign_out(request: web.Request) -> web.Response:
    """End the session."""
    response = _see("/sign-in")
    request.app[ENTRANCE].sessions.end(request, response)
    return response


@web.middleware
async def error_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Show an error as a page to whoever reads pages."""
    response = await handler(request)
    is_problem = isinstance(response, web.Response) and response.content_type == "application/problem+json"
    if not is_problem or request.path.startswith("/api") or "text/html" not in request.headers.get("Accept", ""):
        return response
    assert isinstance(response, web.Response) and isinstance(response.body, bytes)
    problem = msgspec.json.decode(response.body)
    return _page(request, "error.html", status=response.status, problem=problem)


def progress(row: Row) -> Row:
    """How far a round's newest attempt is: what is counted in its stage, against what."""
    counted = _COUNTED_STAGES.get(row["stage"], "reported")
    return {"counted": counted, "count": row[counted], "goal": row["goal_count"], "minimum": row["minimum_count"]}


def _sign_in_page(request: web.Request, *, wanted: str, refusal: str = "", status: int = 200) -> web.Response:
    return _page(request, "sign_in.html", status=status, wanted=wanted, refusal=refusal)


def _page(request: web.Request, template: str, *, status: int = 200, **values: Any) -> web.Response:
    identity: Identity | None = request.get(IDENTITY)
    # nobody acts on what was: a page of the past has no forms
    may = identity.may if identity and not values.get("past") else _nothing
    text = request.app[TEMPLATES].get_template(template).render(identity=identity, may=may, **values)
    return web.Response(status=status, text=text, content_type="text/html")


def _nothing(_: str) -> bool:
    return False


def _see(place: str) -> web.Response:
    return web.Response(status=303, headers={"Location": place})


def _moment(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _share(count: float, whole: float) -> float:
    """Per cent of the whole, at most all of it."""
    return round(min(100.0, 100.0 * count / whole), 2) if whole else 0.0


def _short(digest: str) -> str:
    return digest[:12]


def _points(curve: list[tuple[int, float]]) -> str:
    return " ".join(f"{number}:{value:.6g}" for number, value in curve)
