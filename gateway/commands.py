"""The part of the API that changes things: each request becomes one command to the service that owns the answer."""

from typing import Annotated

import msgspec
from aiohttp import web

from fedota.contracts.commands import (
    Announced,
    ApproveParticipation,
    Command,
    CreateProblem,
    Name,
    Organization,
    PrepareUpload,
    Reason,
    RefuseParticipation,
    RequestParticipation,
    ReviseProblem,
    RevokeParticipation,
    StartProblem,
    StopProblem,
    StoreFiles,
    Text,
    UploadSlots,
)
from fedota.events.problems import Plan
from gateway.parts import IDENTITY, answer, command, new_problem_id, organization_of, problem_id_of, reads_of
from gateway.web_errors import body_of


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON body of a request."""


class NewProblem(Body, frozen=True, kw_only=True):
    """A problem as its setter describes it."""

    name: Name
    description: Text
    data_format: Text
    client_image: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    plan: Plan


class Revision(Body, frozen=True, kw_only=True):
    """What changes; fields left out stay as they are."""

    name: Name | None = None
    description: Text | None = None
    data_format: Text | None = None
    client_image: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    plan: Plan | None = None


class Files(Body, frozen=True, kw_only=True):
    """Files as they will be, or were, uploaded."""

    files: Announced


class Stop(Body, frozen=True, kw_only=True):
    """Why a training is ended."""

    reason: Reason = "stopped by the setter"


class Joining(Body, frozen=True, kw_only=True):
    """Who wants to take part."""

    organization: Organization


class Refusal(Body, frozen=True, kw_only=True):
    """Why somebody may not take part."""

    reason: Reason


class Nothing(Body, frozen=True, kw_only=True):
    """No fields at all."""


async def create_problem(request: web.Request) -> web.Response:
    """Publish a problem."""
    body = await body_of(request, NewProblem)
    problem_id = new_problem_id(request)
    reply = await command(request, CreateProblem(problem_id=problem_id, **msgspec.structs.asdict(body)))
    location = f"/api/problems/{problem_id}"
    return answer({"problem_id": problem_id}, status=201, position=reply.position, location=location)


async def revise_problem(request: web.Request) -> web.Response:
    """Change a problem before its start."""
    body = await body_of(request, Revision)
    return await _done(request, ReviseProblem(problem_id=problem_id_of(request), **msgspec.structs.asdict(body)))


async def start_problem(request: web.Request) -> web.Response:
    """Ask for the training to begin."""
    await body_of(request, Nothing)
    return await _done(request, StartProblem(problem_id=problem_id_of(request)))


async def stop_problem(request: web.Request) -> web.Response:
    """End the training before its last round."""
    body = await body_of(request, Stop)
    return await _done(request, StopProblem(problem_id=problem_id_of(request), reason=body.reason))


async def prepare_upload(request: web.Request) -> web.Response:
    """Slots to upload files to, past the gateway."""
    body = await body_of(request, Files)
    problem_id = await _existing_problem(request)
    reply = await command(request, PrepareUpload(problem_id=problem_id, files=body.files))
    return answer(msgspec.convert(reply.result, UploadSlots))


async def store_files(request: web.Request) -> web.Response:
    """Have uploaded files verified and kept."""
    body = await body_of(request, Files)
    return await _done(request, StoreFiles(problem_id=await _existing_problem(request), files=body.files))


async def request_participation(request: web.Request) -> web.Response:
    """Ask to take part."""
    body = await body_of(request, Joining)
    request[IDENTITY].require_organization(body.organization)
    what = RequestParticipation(problem_id=problem_id_of(request), organization=body.organization)
    return await _done(request, what, status=201)


async def approve_participation(request: web.Request) -> web.Response:
    """Let an organization in."""
    await body_of(request, Nothing)
    what = ApproveParticipation(problem_id=problem_id_of(request), organization=organization_of(request))
    return await _done(request, what)


async def refuse_participation(request: web.Request) -> web.Response:
    """Turn an organization's request down."""
    reason = (await body_of(request, Refusal)).reason
    organization = organization_of(request)
    what = RefuseParticipation(problem_id=problem_id_of(request), organization=organization, reason=reason)
    return await _done(request, what)


async def revoke_participation(request: web.Request) -> web.Response:
    """End a participation that was approved."""
    reason = (await body_of(request, Refusal)).reason
    organization = organization_of(request)
    what = RevokeParticipation(problem_id=problem_id_of(request), organization=organization, reason=reason)
    return await _done(request, what)


async def _existing_problem(request: web.Request) -> str:
    """Storage knows files, not problems: that there is one is checked here."""
    problem_id = problem_id_of(request)
    await reads_of(request).problem(problem_id)
    return problem_id


async def _done(request: web.Request, what: Command, status: int = 200) -> web.Response:
    reply = await command(request, what)
    return answer({"position": reply.position}, status=status, position=reply.position)
