"""The part of the API that changes things: each request becomes one command to the service that owns the answer."""

from typing import TypeVar

import msgspec
from aiohttp import web

from fedota.contracts.commands import (
    ApproveParticipation,
    Command,
    CreateProblem,
    PrepareUpload,
    RefuseParticipation,
    RequestParticipation,
    ReviseProblem,
    RevokeParticipation,
    StartProblem,
    StopProblem,
    StoreFiles,
    UploadSlots,
)
from gateway.parts import IDENTITY, answer, command, new_problem_id, organization_of, problem_id_of, reads_of
from gateway.web_errors import body_of

C = TypeVar("C", bound=Command)


async def create_problem(request: web.Request) -> web.Response:
    """Publish a problem."""
    problem_id = await new_problem_id(request)
    reply = await command(request, await body_of(request, CreateProblem, problem_id=problem_id))
    location = f"/api/problems/{problem_id}"
    return answer({"problem_id": problem_id}, status=201, position=reply.position, location=location)


async def revise_problem(request: web.Request) -> web.Response:
    """Change a problem before its start; fields left out stay as they are."""
    return await _done(request, await _about_problem(request, ReviseProblem))


async def start_problem(request: web.Request) -> web.Response:
    """Ask for the training to begin."""
    return await _done(request, await _about_problem(request, StartProblem))


async def stop_problem(request: web.Request) -> web.Response:
    """End the training before its last round."""
    return await _done(request, await _about_problem(request, StopProblem))


async def prepare_upload(request: web.Request) -> web.Response:
    """Slots to upload files to, past the gateway."""
    reply = await command(request, await _about_files(request, PrepareUpload))
    return answer(msgspec.convert(reply.result, UploadSlots))


async def store_files(request: web.Request) -> web.Response:
    """Have uploaded files verified and kept."""
    return await _done(request, await _about_files(request, StoreFiles))


async def request_participation(request: web.Request) -> web.Response:
    """Ask to take part."""
    what = await _about_problem(request, RequestParticipation)
    request[IDENTITY].require_organization(what.organization)
    return await _done(request, what, status=201)


async def approve_participation(request: web.Request) -> web.Response:
    """Let an organization in."""
    return await _done(request, await _about_member(request, ApproveParticipation))


async def refuse_participation(request: web.Request) -> web.Response:
    """Turn an organization's request down."""
    return await _done(request, await _about_member(request, RefuseParticipation))


async def revoke_participation(request: web.Request) -> web.Response:
    """End a participation that was approved."""
    return await _done(request, await _about_member(request, RevokeParticipation))


async def _about_problem(request: web.Request, kind: type[C]) -> C:
    return await body_of(request, kind, problem_id=problem_id_of(request))


async def _about_member(request: web.Request, kind: type[C]) -> C:
    organization = organization_of(request)
    return await body_of(request, kind, problem_id=problem_id_of(request), organization=organization)


async def _about_files(request: web.Request, kind: type[C]) -> C:
    """Storage knows files, not problems: that there is one is checked here."""
    what = await _about_problem(request, kind)
    await reads_of(request).problem(what.problem_id)
    return what


async def _done(request: web.Request, what: Command, status: int = 200) -> web.Response:
    reply = await command(request, what)
    return answer({"position": reply.position}, status=status, position=reply.position)
