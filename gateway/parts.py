"""What a request handler finds at hand: the gateway's resources, who asks, and what the address says."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple
from uuid import NAMESPACE_URL, uuid5

import msgspec
from aiohttp import web

from fedota.contracts.commands import Command, FileName, Organization, Reply
from fedota.errors import FedotaError
from fedota.events import to_json, uuid7
from fedota.kernel.bus import Bus
from gateway.auth import Identity, TokensFile
from gateway.people import PEOPLE
from gateway.reads import Reads, is_problem_id
from gateway.stream import Feed

POSITION_HEADER: Final = "Fedota-Position"
# https://www.w3.org/TR/trace-context/: version, trace id, parent id and flags; ff and ids of zeros are no such things
_TRACEPARENT: Final = re.compile("(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_Key = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]


class Parts(NamedTuple):
    """The resources, while the gateway runs."""

    bus: Bus
    reads: Reads
    feed: Feed


PARTS: Final = web.AppKey("parts", Parts)
HEARTBEAT: Final = web.AppKey("heartbeat", float)
SCHEME: Final = web.AppKey("scheme", str)  # by which people reach the gateway
TOKENS: Final = web.AppKey("tokens", TokensFile)
IDENTITY: Final = web.RequestKey("identity", Identity)
_ACTOR: Final = web.RequestKey("actor", str)
STILL_IN: Final = web.RequestKey[Callable[[], bool]]("still_in")


def reads_of(request: web.Request) -> Reads:
    """The read model."""
    return request.app[PARTS].reads


def problem_id_of(request: web.Request) -> str:
    """The problem in the address. Raises `problem_not_found` when nothing could have that id."""
    problem_id = request.match_info["problem"]
    if not is_problem_id(problem_id):
        raise FedotaError("problem_not_found", "A problem's id is a UUID. GET /api/problems lists them.")
    return problem_id


def organization_of(request: web.Request) -> str:
    """The organization in the address. Raises `forbidden` when the identity acts for another one."""
    organization: str = _in_address(request, "organization", Organization)
    request[IDENTITY].require_organization(organization)
    return organization


def organization_asked_for(request: web.Request) -> str | None:
    """The organization that a read is about; None for all.

    Whoever acts for one asks about that one: `forbidden` is raised for another.
    """
    asked, identity = request.query.get("organization"), request[IDENTITY]
    if asked is None:
        return identity.organization
    organization: str = _checked("organization", asked, Organization)
    identity.require_organization(organization)
    return organization


def file_name_of(request: web.Request) -> str:
    """The file's name in the address."""
    name: str = _in_address(request, "name", FileName)
    return name


def _in_address(request: web.Request, name: str, kind: Any) -> Any:
    return _checked(name, request.match_info[name], kind)


def _checked(name: str, text: str, kind: Any) -> Any:
    try:
        return msgspec.convert(text, kind)
    except msgspec.ValidationError as error:
        raise FedotaError("invalid_field", f"{name}: {error}.", fields={name: str(error)}) from None


def key_of(request: web.Request) -> str | None:
    """The request's `Idempotency-Key`."""
    key = request.headers.get("Idempotency-Key")
    if key is not None:
        _checked("Idempotency-Key", key, _Key)
    return key


async def actor_of(request: web.Request) -> str:
    """How everybody but the gateway knows who asks: a person by its sealed name, the same text each time.

    Raises `unauthenticated` when the token has been taken out of the tokens file since: its person may be forgotten.
    """
    if _ACTOR not in request:
        if not request[STILL_IN]():
            raise FedotaError("unauthenticated", "Your token is not known here any more. Ask the operator for one.")
        identity = request[IDENTITY]
        request[_ACTOR] = await request.app[PEOPLE].actor(identity.standing, identity.person)
    return request[_ACTOR]


async def new_problem_id(request: web.Request) -> str:
    """An id for a problem: always the same for the same actor and `Idempotency-Key`, so a retry names the same one."""
    key = key_of(request)
    return str(uuid7() if key is None else uuid5(NAMESPACE_URL, f"fedota:{await actor_of(request)}\n{key}"))


async def command(request: web.Request, what: Command) -> Reply:
    """Send a command for whoever asks."""
    return await request.app[PARTS].bus.command(
        what, actor=await actor_of(request), key=key_of(request), traceparent=traceparent_of(request)
    )


def traceparent_of(request: web.Request) -> str | None:
    """The trace that the request is part of; a header of another form is passed over, as W3C demands."""
    sent = request.headers.get("traceparent", "")
    return sent if _TRACEPARENT.fullmatch(sent) else None


def answer(body: Any, *, status: int = 200, position: int = 0, location: str | None = None) -> web.Response:
    """A JSON response; with `position` it says what a read has to wait for to show what this did."""
    headers = {"Cache-Control": "no-store"}
    if position:
        headers[POSITION_HEADER] = str(position)
    if location:
        headers["Location"] = location
    return web.Response(status=status, body=to_json(body), content_type="application/json", headers=headers)
