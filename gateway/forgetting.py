"""The people whose names can be opened, and how an operator has one forgotten."""

from aiohttp import web

from gateway.parts import TOKENS, actor_of, answer
from gateway.people import PEOPLE


async def list_people(request: web.Request) -> web.Response:
    """Everybody whose name can be opened."""
    return answer({"people": await request.app[PEOPLE].listed()})


async def forget_person(request: web.Request) -> web.Response:
    """Forget one, by name or id; says what remains. Not while a token names that person, who would act anew with it."""
    by, named = await actor_of(request), request.app[TOKENS].current.people
    return answer(await request.app[PEOPLE].forget(request.match_info["person"], by=by, named=named))
