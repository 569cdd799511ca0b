"""The gateway as an operator's terminal reaches it: where it is, with which token, and what can be asked there."""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit
from uuid import UUID

import click
import msgspec
from click.core import ParameterSource

from fedota.client.api import Gateway
from fedota.contracts.operations import DeadLetter, ProjectionStatus, Retried
from fedota.errors import FedotaError
from fedota.operate.terminal import note, to_the_end
from fedota.options import data_dir_option

Params = list[tuple[str, str]]
Body = dict[str, Any]
PAGE: Final = 1000  # events asked for at once
_PATIENCE: Final = 5.0  # seconds that a question is repeated when nobody answers
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
_MOST_NAMES: Final = 1000
_PASSING: Final = frozenset({"unavailable", "timeout"})
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class Place(NamedTuple):
    """Where the gateway is, and the token to show there, with words on where that came from."""

    url: str
    token: str
    source: str


class Page(NamedTuple):
    """Events as the gateway gives them, where to go on after them, and how far the log goes."""

    events: list[Body]
    next: int
    head: int


class Letter(DeadLetter, frozen=True, kw_only=True):
    """A dead letter of one process; alone it comes with its event, and those that are parked behind it."""

    process: str
    event: Body | None = None
    behind: list["Letter"] = []


class Letters(NamedTuple):
    """Dead letters, and the processes that did not answer."""

    letters: list[Letter]
    silent: list[str]


class Projections(NamedTuple):
    """How far each is, and the processes that did not answer."""

    told: list[ProjectionStatus]
    silent: list[str]


class Door(Gateway):
    """What an operator asks at a gateway. Questions are repeated while nobody answers; orders are given once."""

    async def page(self, params: Params, after: int, limit: int = PAGE) -> Page:
        """Events past `after`, at most `limit`."""
        where = [("after", str(after)), ("limit", str(limit))]
        answer = await self._ask("GET", "/api/events", params=[*params, *where])
        return Page(answer["events"], answer["next"], answer["head"])

    async def head(self) -> int:
        """How far the log goes."""
        return (await self.page([], 0, 0)).head

    async def pages(self, params: Params, after: int, until: int) -> AsyncGenerator[list[Body], None]:
        """All events past `after` up to `until`, in order, in pages; the next one is on its way meanwhile."""
        if until <= after:
            return
        ends = [*params, ("until", str(until))]
        coming = asyncio.create_task(self.page(ends, after))
        try:
            while (page := await coming).next > after:
                after = page.next
                coming = asyncio.create_task(self.page(ends, after))
                yield page.events
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def newest(self, params: Params, until: int, limit: int) -> list[Body]:
        """The last `limit` events up to `until`, in order: looked for backwards, further at each step."""
        found: list[Body] = []
        width = max(limit, 100)
        while until > 0 and len(found) < limit:
            begin = max(0, until - width)
            async with aclosing(self.pages(params, begin, until)) as pages:
                found = [event async for page in pages for event in page] + found
            until, width = begin, min(4 * width, 100_000)
        return found[-limit:]

    async def event(self, position: int) -> Body:
        """One event."""
        return await self._ask("GET", f"/api/events/{position}")

    async def tail(self, params: Params, after: int, tell: Callable[[str], None]) -> AsyncGenerator[bytes, None]:
        """Events past `after` as they come, without an end: a broken stream goes on behind the last one that came.

        `tell` hears that the stream broke and why, and that it is there again. The first connection has to succeed.
        """
        connected, broken, pause = False, "", _FIRST_PAUSE
        while True:
            try:
                async with aclosing(self._stream([*params, ("after", str(after))])) as stream:
                    async for body in stream:
                        if broken:
                            tell("Connected again.")
                        connected, broken, pause = True, "", _FIRST_PAUSE
                        if body:
                            after = msgspec.json.decode(body, type=_Positioned).position
                            yield body
                why = "The gateway ended the stream."
            except FedotaError as error:
                if not connected or error.problem.code not in _PASSING:
                    raise
                why = error.problem.detail
            if not broken:
                tell(f"{why} Trying again…")
            broken = why
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def problem(self, problem_id: str) -> Body | None:
        """A problem as it is now; None when there is none."""
        return await self._found(f"/api/problems/{problem_id}", [])

    async def problems(self, params: Params, most: int = _MOST_NAMES) -> AsyncGenerator[list[Body], None]:
        """The problems, newest first, in pages."""
        before: int | None = 2**62
        while before is not None:
            asked = [*params, ("limit", str(most)), ("before", str(before))]
            page = await self._ask("GET", "/api/problems", params=asked)
            before = page["next"]
            yield page["problems"]

    async def projections(self) -> Projections:
        """How far each projection is."""
        answer = await self._ask("GET", "/api/projections")
        return Projections(msgspec.convert(answer["projections"], list[ProjectionStatus]), answer["unavailable"])

    async def projection(self, process: str) -> ProjectionStatus:
        """How far one is."""
        return msgspec.convert(await self._ask("GET", f"/api/projections/{_segment(process)}"), ProjectionStatus)

    async def begin(self, process: str, kind: str) -> ProjectionStatus:
        """Begin a rebuild or a verification."""
        return msgspec.convert(await self._order(f"/api/projections/{_segment(process)}/{kind}"), ProjectionStatus)

    async def dead_letters(self, process: str | None) -> Letters:
        """The dead letters of one process, or of all."""
        asked = [("process", process)] if process else []
        answer = await self._ask("GET", "/api/deadletters", params=asked)
        return Letters(msgspec.convert(answer["dead_letters"], list[Letter]), answer["unavailable"])

    async def dead_letter(self, process: str, position: int) -> Letter:
        """One of them."""
        return msgspec.convert(await self._ask("GET", _letter(process, position)), Letter)

    async def retry(self, process: str, position: int) -> Retried:
        """Have it handled again."""
        return msgspec.convert(await self._order(f"{_letter(process, position)}/retry"), Retried)

    async def drop(self, process: str, position: int) -> DeadLetter:
        """Give it up."""
        return msgspec.convert(await self._order(f"{_letter(process, position)}/drop"), DeadLetter)

    async def people(self) -> list[Body]:
        """Whose names can be opened: `id` and `name` of each."""
        answer = await self._ask("GET", "/api/people")
        return list(answer["people"])

    async def forget(self, person: str) -> Body:
        """Have a person forgotten, by id; what remains of it. Twice is as good as once."""
        return await self._ask("DELETE", f"/api/people/{person}")

    async def _order(self, path: str) -> Body:
        # whoever gives it again after a timeout may be told of another state than the one that it was given in
        return await self._asked("POST", path, patience=0.0)

    async def _found(self, path: str, params: Params) -> Body | None:
        try:
            return await self._ask("GET", path, params=params)
        except FedotaError as error:
            if error.problem.code == "problem_not_found":
                return None
            raise


class _Positioned(msgspec.Struct):
    position: int


def _segment(text: str) -> str:
    """What somebody typed, as one part of an address and nothing more."""
    return quote(text, safe="")


def _letter(process: str, position: int) -> str:
    return f"/api/deadletters/{_segment(process)}/{position}"


def is_id(text: str) -> bool:
    """Whether it is a problem's id, whatever its letters' case."""
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False


def at_a_gateway(command: Callable[..., Awaitable[int | None]]) -> Callable[..., None]:
    """Make an async function, which gets the `Door`, a command with options that say where the gateway is.

    What it returns is the exit status. Errors that a user can mend are one plain sentence and exit status 1.
    """

    @data_dir_option
    @click.option("--url", envvar="FEDOTA_URL", show_envvar=True, help="A platform anywhere, by its gateway's address.")
    @click.option(
        "--token-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A file with your token; else it is in FEDOTA_TOKEN with --url, or the operator's with --data-dir.",
    )
    @click.pass_context
    @wraps(command)
    def run(context: click.Context, /, *arguments: Any, **options: Any) -> None:
        where = {name: options.pop(name) for name in ("data_dir", "url", "token_file")}
        told = context.get_parameter_source("data_dir") == ParameterSource.COMMANDLINE
        place = _place(where["data_dir"] if told or not where["url"] else None, where["url"], where["token_file"])
        to_the_end(lambda: _run(place, command, *arguments, **options))

    return run


async def _run(place: Place, command: Callable[..., Awaitable[int | None]], *arguments: Any, **options: Any) -> int:
    try:
        async with Door.open(place.url, place.token, patience=_PATIENCE) as door:
            return await command(door, *arguments, **options) or 0
    except FedotaError as error:
        if error.problem.code == "unauthenticated":
            raise click.ClickException(
                f"{place.url} does not know the token from {place.source}. Ask the operator of that platform for one."
            ) from None
        raise


def _place(data_dir: Path | None, url: str | None, token_file: Path | None) -> Place:
    if data_dir is None:
        assert url
        return _elsewhere(url, token_file)
    # what follows needs the local platform's code, which a platform elsewhere does not
    from fedota.local.background import read_progress
    from fedota.local.state import is_held

    path = data_dir.resolve()
    progress = read_progress(path) if is_held(path) else None
    if progress is None:
        raise click.ClickException(
            f"No platform runs in {path}. Start it with `fedota up`, or say with --data-dir or --url where it is."
        )
    if not progress.gateway_url:
        raise click.ClickException(f"The platform in {path} is starting or stopping. Look with `fedota status`.")
    file = token_file or path / "tokens" / "operator"
    return Place(progress.gateway_url, _read_token(file), str(file))


def _elsewhere(url: str, token_file: Path | None) -> Place:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise click.UsageError(f"{url} is not the address of a gateway. Give one like https://fedota.example.")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        note(f"Warning: {url} is not encrypted: who is on the way can read the token. Use https:// if it is there.")
    if token_file:
        return Place(url, _read_token(token_file), str(token_file))
    token = os.environ.get("FEDOTA_TOKEN", "").strip()
    if not token:
        raise click.UsageError("With --url, say who you are: set FEDOTA_TOKEN, or give a file with --token-file.")
    return Place(url, _plain(token, "FEDOTA_TOKEN"), "FEDOTA_TOKEN")


def _read_token(file: Path) -> str:
    try:
        return _plain(file.read_text().strip(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise click.ClickException(f"The token file {file} cannot be read: {why}.") from None


def _plain(token: str, source: str) -> str:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise click.ClickException(f"{source} does not hold a token: a token is one word of visible characters.")
    return token


async def resolve_problem(door: Door, text: str) -> str:
    """The id behind what somebody typed: an id, or a name, or the beginning of either if only one fits."""
    if is_id(text):
        return text.lower()
    wanted = text.casefold()
    exact: list[Body] = []
    begun: list[Body] = []
    async with aclosing(door.problems([])) as pages:
        async for page in pages:
            exact += [row for row in page if row["name"].casefold() == wanted]
            begun += [
                row for row in page if row["name"].casefold().startswith(wanted) or row["problem_id"].startswith(wanted)
            ]
    found = exact or begun
    if len(found) == 1:
        return str(found[0]["problem_id"])
    if not found:
        raise click.ClickException(f"No problem is called {text!r}, or begins so. Give its name or its id.")
    some = "\n".join(f"  {row['problem_id']}  {row['name']}" for row in found[:10])
    raise click.ClickException(f"{text!r} could be {len(found)} problems; give the id of one:\n{some}")


class Names:
    """What problems are called, asked for once each."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._names: dict[str, str] = {}
        self._primed = False

    async def of(self, problem_id: str) -> str:
        """A problem's name; the end of its id when nobody knows one."""
        if not self._primed:
            self._primed = True
            async with aclosing(self._door.problems([])) as pages:
                async for page in pages:
                    self._names = {row["problem_id"]: row["name"] for row in page}
                    break  # the newest ones; others are asked for when they come up
        if problem_id not in self._names:
            found = await self._door.problem(problem_id) if is_id(problem_id) else None
            self._names[problem_id] = found["name"] if found else f"…{problem_id[-8:]}"
        return self._names[problem_id]

    def heard(self, problem_id: str, name: str) -> None:
        """An event told the name."""
        self._names[problem_id] = name
