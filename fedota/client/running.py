"""A client from its first check-in to the end of the training."""

import asyncio
import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

from fedota.client.errors import ClientError
from fedota.client.kits import require_usable
from fedota.client.selectors import NoAnswerError, Selectors, bounded
from fedota.client.train import Train, Update, call_train
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError
from fedota.runtime.protocol import CheckedIn, ComeBack, Fate, Finished, Selected, SendAgain
from fedota.runtime.tensors import layout_of

Say = Callable[[str], None]
R = TypeVar("R")
_AGAIN: Final = frozenset({"unavailable", "timeout", "offset_mismatch"})  # worth asking again
_CLOSELY: Final = 60.0  # seconds in which a second damaged model has to do with the first one
_MISSED: Final = frozenset({"round_over", "ticket_refused", "not_found"})  # the round goes on without us
_NOT_KNOWN: Final = "is over; whether your update counts is not known here any more, the problem's page shows it"
_FIRST_SILENCE: Final = 60.0  # seconds until a line is said again
_LONGEST_SILENCE: Final = 3600.0


class Kept(NamedTuple):
    """An update that was made, until it is known what became of it."""

    selected: Selected
    update: Update
    until: float


async def run(kit: Kit, train: Train, data: Path, *, patience: float = 600.0, say: Say = lambda _: None) -> None:
    """Take part in a problem until its training is finished.

    `say` hears one line for each step. Raises `ClientError` when it cannot go on: the kit or its token is not good,
    `train` fails or returns what cannot be sent, no selector answers for `patience` seconds.
    """
    require_usable(kit)
    say(f"taking part in {kit.name!r} as {kit.organization}")
    async with Selectors.of(kit, patience) as selectors:
        await _Client(selectors, train, data, patience, say).run()


class _Client:
    def __init__(self, selectors: Selectors, train: Train, data: Path, patience: float, say: Say) -> None:
        self._selectors = selectors
        self._train = train
        self._data = data
        self._patience = patience
        self._damaged_since = 0.0
        self._damaged_until = 0.0  # a damaged model whose fetching begins later has nothing to do with the earlier ones
        self._kept: Kept | None = None
        self._begun = False  # whether the kept update, or a part of it, may have arrived somewhere
        self._arrived = False
        self._lines = _Lines(say)
        self._say = self._lines.news

    async def run(self) -> None:
        while True:
            try:
                answer = await self._check_in()
                if await self._obey(answer):
                    return
            except NoAnswerError as error:
                self._lines.now_and_then(f"a selector does not answer ({error}); trying again ...")
            except FedotaError as error:
                await self._overcome(error)

    async def _check_in(self) -> CheckedIn:
        if self._kept is None:
            self._lines.now_and_then("waiting to be selected ...")
        answer = await self._selectors.check_in(self._kept.selected.ticket if self._kept else None)
        if not isinstance(answer, SendAgain):
            self._learn(answer.update, known=answer.known is not False)
        return answer

    def _learn(self, fate: Fate, *, known: bool) -> None:
        """What became of the update that was kept."""
        if self._kept is None or fate in ("none", "pending"):
            return
        number = self._kept.selected.round
        self._kept = None
        without = "ended without you" if known else _NOT_KNOWN
        self._say(f"round {number}: {'your update counts' if fate == 'counted' else without}")

    async def _obey(self, answer: CheckedIn) -> bool:
        """Do as the selector says; True when the training is finished."""
        match answer:
            case Finished(reason=reason):
                self._say(reason)
                return True
            case Selected():
                await self._take_part(answer)
            case SendAgain():
                await self._send()
            case ComeBack():
                seconds = bounded(answer.seconds)
                if seconds and answer.update == "pending" and not self._arrived:
                    self._selectors.turn()  # this one cannot take the update; the one that was to have it may live
                if seconds >= 5:
                    self._lines.now_and_then(f"the selector asks to come back after {seconds:.0f} seconds")
                await self._selectors.pause(seconds)
        return False

    async def _take_part(self, selected: Selected) -> None:
        if self._kept is None or self._kept.selected.ticket != selected.ticket:
            self._kept = await self._made(selected)
            self._begun = self._arrived = False
        await self._send()

    async def _made(self, selected: Selected) -> Kept:
        """Fetch the model and train on it."""
        number, began = selected.round, monotonic()
        until = began + selected.seconds
        self._say(f"round {number}: selected, fetching the model ({_size(selected.model.size)})")
        body = await self._selectors.fetch(selected.model)
        if (await asyncio.to_thread(hashlib.sha256, body)).hexdigest() != selected.model.sha256:
            await self._turn_away(began)
        self._damaged_until = 0.0
        try:
            layout = await asyncio.to_thread(layout_of, body)
        except FedotaError as error:
            raise ClientError(f"The model cannot be read here. {error.problem.detail or error.problem.title}") from None
        self._say(f"round {number}: training on your data ...")
        began = monotonic()
        config = {"round": number, **selected.config}
        update = await _in_thread(lambda: call_train(self._train, layout.views(body), self._data, config, layout))
        self._say(
            f"round {number}: trained on {update.examples} examples in {monotonic() - began:.1f} s, sending the update"
        )
        return Kept(selected, update, until)

    async def _turn_away(self, began: float) -> NoReturn:
        """The model came damaged: the next selector may do better, and none of them is asked for it without a pause.

        Only what follows closely counts: nobody knows how it was while we trained, or were not selected.
        """
        if began > self._damaged_until:
            self._damaged_since = monotonic()
        damaged = monotonic() - self._damaged_since
        if damaged > self._patience:
            raise ClientError(
                f"For {damaged:.0f} seconds the model came damaged, whichever selector was asked. Tell the people who "
                "run the problem: something between you and its selectors changes what is sent, or their disks do."
            )
        self._selectors.turn()
        await self._selectors.pause(max(1.0, damaged / 2))
        self._damaged_until = monotonic() + _CLOSELY
        raise NoAnswerError("the model came damaged")

    async def _send(self) -> None:
        if self._kept is None:
            return
        number, ticket, left = self._kept.selected.round, self._kept.selected.ticket, self._kept.until - monotonic()
        begun, self._begun, self._arrived = self._begun, True, False
        try:
            await self._selectors.send(ticket, self._kept.update, left, begun=begun)
        except FedotaError as error:
            if error.problem.code != "already_reported":
                raise
        self._arrived = True
        self._say(f"round {number}: the update has arrived, waiting for the round to complete ...")

    async def _overcome(self, error: FedotaError) -> None:
        """Go on after a refusal where that makes sense; else raise `ClientError`."""
        problem = error.problem
        if problem.code in _MISSED:
            if self._kept is not None:
                self._say(f"round {self._kept.selected.round}: too late, no more updates are taken")
            if problem.code != "round_over":  # else it may have arrived before, and the next check-in tells
                self._kept = None
            await self._selectors.pause(0.1)
        elif problem.code in _AGAIN:
            if problem.code == "unavailable":
                why = problem.detail or problem.title
                self._lines.now_and_then(f"a selector puts this client off ({why}); trying again ...")
            await self._selectors.pause(max(1, problem.retry_after or 1))
        elif problem.code == "token_refused":
            raise ClientError(problem.detail or "The selector refused the join kit's token. Fetch a new join kit.")
        else:
            raise ClientError(f"The selector refused the update: {problem.detail or problem.title}")


class _Lines:
    """Says each line at once, and again only after a while that grows each time, or when there was news in between."""

    def __init__(self, say: Say) -> None:
        self._hear = say
        self._said: dict[str, tuple[float, float]] = {}  # until when it is not said again, and how long that was

    def news(self, line: str) -> None:
        """The training goes on."""
        if line not in self._said:
            self._said.clear()
        self.now_and_then(line)

    def now_and_then(self, line: str) -> None:
        """What may be so for hours, over and over."""
        now = monotonic()
        until, silence = self._said.get(line, (0.0, _FIRST_SILENCE / 2))
        if now >= until:
            silence = min(2 * silence, _LONGEST_SILENCE)
            self._said[line] = (now + silence, silence)
            self._hear(line)


async def _in_thread(work: Callable[[], R]) -> R:
    """Run in a thread that does not keep the process alive: Ctrl-C ends a training at once."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error is not None else done.set_result(result)

    def body() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:  # it is raised again where it is awaited
            result, error = None, raised
        with suppress(RuntimeError):  # a run that was cancelled may have closed its loop long before this
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, name="train", daemon=True).start()
    return await done


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
