"""What a selector does: obeys its coordinator's orders, and says how things stand."""

import asyncio
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import structlog

from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.events import uuid7
from fedota.process import Service
from fedota.runtime.protocol import (
    CheckedIn,
    Claim,
    ComeBack,
    Fate,
    Finished,
    ModelRef,
    Orders,
    Selected,
    SendAgain,
    Told,
    Work,
)
from fedota.runtime.rooms import Rooms
from fedota.runtime.selector.cohort import Cohort
from fedota.runtime.selector.link import Link
from fedota.runtime.selector.pace import Pace
from fedota.runtime.selector.pool import Pool, Waiting
from fedota.runtime.selector.spool import Spool
from fedota.runtime.tensors import Layout, read_layout
from fedota.runtime.tickets import Ticket, Tickets

_HEARTBEAT: Final = 5.0  # seconds; a third of the silence after which the coordinator gives a selector up
_GATHERING: Final = 2.0  # seconds that a selection waits for clients between two long polls
_LONGEST_DELAY: Final = 2.0
_REMEMBERED: Final = 256  # cohorts; more often in a row no coordinator begins one attempt anew
_MOST_FATES: Final = 100_000  # tickets; some 10 MB
_ASKING: Final = 5.0  # seconds that the coordinator has to say what became of an update
_MANY: Final = 100  # organizations; what is told of so many takes its time to make and to read
_PAUSE: Final = 2e-5  # seconds for each of them until more is told
# What the coordinator's answer to a claim says of an update whose cohort is over, as we heard. `over`: it does not
# remember that cohort. The last three: it is not over, and our orders are old.
_FATES: Final[dict[str, Fate | None]] = {
    "counted": "counted",
    "left_out": "over",
    "over": None,
    "granted": "pending",
    "wait": "pending",
    "taken": "pending",
}
_log = structlog.get_logger(__name__)


class Selecting:
    """The selector's state. Orders tell what should be; `obey` brings it about, whatever was missed."""

    def __init__(self, settings: SelectorSettings, directory: Path) -> None:
        self.life = uuid7().hex
        self.tickets = Tickets(settings.key, settings.problem_id, settings.run)
        self.pool = Pool(self.changed)
        self.pace = Pace(random.Random())  # noqa: S311 - only spreads the requests
        self.cohort: Cohort | None = None
        self.spool: Spool | None = None
        self.connected = False
        self._closing = False
        self._settings = settings
        authority = settings.coordinator_authority
        self._link = Link(settings.coordinator, settings.key, settings.name, self.life, authority)
        self._models = directory / "models"
        self._layouts: dict[str, Layout] = {}
        self._rooms = Rooms()
        self._orders: Orders | None = None
        self._ordered = asyncio.Event()
        self._changed = asyncio.Event()
        self._told = 0  # messages
        self._fates: dict[str, Fate] = {}  # by ticket, what became of updates whose cohorts are over, the newest last
        self._handing: tuple[str, asyncio.Timeout] | None = None  # the collection for which a sum is being sent
        self._begun: deque[str] = deque(maxlen=_REMEMBERED)  # cohorts

    @asynccontextmanager
    async def running(self, service: Service) -> AsyncIterator[None]:
        """At work within this."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._link.open())
            for name, work in (("orders", self.listen()), ("tell", self.tell()), ("work", self.obey())):
                await stack.enter_async_context(service.running(name, work, vital=True))
            yield

    # Towards the coordinator.

    async def listen(self) -> None:
        """Hear orders, for ever."""
        delay = 0.0
        while True:
            try:
                orders = await self._link.orders()
            except FedotaError as error:
                if self.connected:
                    _log.warning("the coordinator does not answer", error=str(error))
                self.connected = False
                delay = min(2 * delay + 0.05, _LONGEST_DELAY)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - only spreads the attempts
                continue
            if not self.connected:  # it may be another one: what it does not know yet is said again
                self.connected = True
                self.changed()
                if self._orders is not None:  # what the one before had wanted may be wanted still
                    self._ordered.set()
            delay = 0.0
            if orders is not None:
                self._hear(orders)

    def _hear(self, orders: Orders) -> None:
        self._orders = orders
        self._ordered.set()
        self.pool.dismiss(orders.revoked)
        self._remember(orders)
        if self._handing is not None and not self._is_wanted(self._handing[0]):
            self._handing[1].reschedule(asyncio.get_running_loop().time())
            self._handing = None

    def _is_wanted(self, collect: str) -> bool:
        """Whether the sum is still asked for by this collection's name."""
        return self._orders is not None and self._orders.work is not None and self._orders.work.collect == collect

    def _remember(self, orders: Orders) -> None:
        """Whose updates count: their clients may ask when more cohorts are over."""
        last, cohort = orders.last, self.cohort
        if last is None or not last.counted or cohort is None or cohort.id != last.cohort or orders.life != self.life:
            return
        self._keep_fates(dict.fromkeys(cohort.accepted, "counted"))

    def _keep_fates(self, fates: dict[str, Fate]) -> None:
        self._fates |= fates
        for ticket in list(islice(self._fates, max(0, len(self._fates) - _MOST_FATES))):
            del self._fates[ticket]

    async def tell(self) -> None:
        """Say how things stand after each change, and now and then."""
        while True:
            self._changed.clear()
            held = self.cohort.held() if self.cohort else None
            self._told += 1
            told = Told(
                name=self._settings.name,
                life=self.life,
                number=self._told,
                waiting=len(self.pool),
                organizations=self.pool.organizations,
                held=held,
            )
            try:
                await self._link.tell(told)
            except FedotaError:
                await asyncio.sleep(random.uniform(0.1, 0.3))  # noqa: S311 - only spreads the attempts
                continue
            if (size := len(told.organizations) + (len(held.contributions) if held else 0)) > _MANY:
                await asyncio.sleep(size * _PAUSE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _HEARTBEAT)

    async def obey(self) -> None:
        """Do what the latest orders ask for, for ever."""
        delay = 0.0
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            assert self._orders is not None
            try:
                await self._obey(self._orders)
                delay = 0.0
            except FedotaError as error:
                _log.warning("orders could not be followed yet", error=str(error))
                delay = min(2 * delay + 0.05, _LONGEST_DELAY)
                await asyncio.sleep(delay)
                self._ordered.set()

    async def _obey(self, orders: Orders) -> None:
        if orders.life != self.life:
            return  # to whom we were
        if orders.lost:
            self.begin_again()
            return
        if orders.finished is not None:
            self._drop()
            self.pool.dismiss()
            return
        if orders.work is None:
            if not orders.settling:
                self._drop()
        elif self.cohort is None or self.cohort.id != orders.work.cohort:
            await self._begin(orders.work)
        else:
            await self._go_on(self.cohort, orders.work)
        if not self._ordered.is_set():  # nothing newer is to be done: be ready for what comes next
            await self._have(orders.model)

    def begin_again(self) -> None:
        """We were taken for dead, and are not: clients may send us again what does not count any more."""
        _log.warning("the coordinator had given this selector up; it begins again", life=self.life)
        self._drop()
        self.life = self._link.life = uuid7().hex
        self.pool.dismiss()  # who keeps an update must not wait for the end of its poll to hear that it is needed
        self.changed()

    def _drop(self) -> None:
        if self.cohort is None:
            return
        self.cohort.closed = True
        self.cohort.uploads.close()
        self.cohort = None
        self.pace.round_ended()
        self.changed()

    async def _begin(self, work: Work) -> None:
        layout = await self._have(work.base)
        if self._ordered.is_set() or not self.connected:
            # That took a while. There are newer orders, or will be: who gave these may have been killed, and whoever
            # comes after it wants something else. They are not worth a ticket any more.
            return
        self._drop()
        if self.spool is None or self.spool.model != layout.size:
            self.spool = Spool(layout.size, self._models)
        self.cohort = cohort = Cohort(work, layout, self.model_file(work.base.sha256), self._rooms)
        # Nobody is selected when it is too late, nor a second time for a cohort that was dropped and is taken up again.
        share = 0 if work.collect or work.cohort in self._begun else work.share
        self._begun.append(work.cohort)
        if share:
            await self.pool.gathered(share, _GATHERING, work.quotas)
        now = time.monotonic()
        self.pace.round_began(now, now + work.deadline - time.time())
        cohort.selected = self.pool.select(share, self._issue, work.quotas, work.cohort)
        self.changed()

    def _issue(self, who: Waiting) -> str:
        assert self.cohort is not None
        work = self.cohort.work
        ticket = Ticket(
            id=secrets.token_hex(12),
            organization=who.organization,
            client=who.client,
            round=work.round,
            attempt=work.attempt,
            cohort=work.cohort,
            selector=self._settings.name,
            life=self.life,
            issued=time.time(),
        )
        signed = self.tickets.sign(ticket)
        self.cohort.issued[who] = signed
        return signed

    async def _go_on(self, cohort: Cohort, work: Work) -> None:
        if cohort.work.shares != work.shares:  # a life was lost: who comes after this coordinator must know, too
            cohort.work = msgspec.structs.replace(cohort.work, shares=work.shares)
            self.changed()
        if not work.collect:
            if cohort.closed:
                cohort.closed = False
                self.changed()
            return
        if not cohort.closed:
            cohort.closed = True
        self.changed()
        if cohort.handed == work.collect:
            return
        async with cohort.lock:  # an update that is being added is in the sum when it is handed over
            if cohort.accepted:
                try:
                    await self._hand_over(cohort, work.collect)
                except FedotaError as error:
                    if error.problem.code not in ("round_over", "conflict"):
                        raise
                    _log.warning("the sum was not taken", error=str(error))
            cohort.handed = work.collect
        self.changed()  # only now is it sure that nothing is being added any more

    async def _hand_over(self, cohort: Cohort, collect: str) -> None:
        """Send the sum for as long as it is asked for: later orders do not wait for a connection that is dead."""
        overtaken = FedotaError("round_over", "Other orders came before the sum was taken.")
        if not self._is_wanted(collect):
            raise overtaken
        try:
            async with asyncio.timeout(None) as patience:
                self._handing = collect, patience
                await self._link.hand_over(cohort.meta(self.life, collect), cohort.numbers)
        except TimeoutError:
            raise overtaken from None
        finally:
            self._handing = None

    async def _have(self, model: ModelRef) -> Layout:
        """The layout of a model that is here, fetched if need be; those that nobody needs are removed."""
        if (layout := self._layouts.get(model.sha256)) is None:
            path = self.model_file(model.sha256)
            await asyncio.to_thread(self._models.mkdir, mode=0o700, exist_ok=True)
            await self._link.fetch(model, path)
            layout = self._layouts[model.sha256] = await asyncio.to_thread(read_layout, path)
        needed = {model.sha256, self.cohort.work.base.sha256 if self.cohort else ""}
        for old in self._layouts.keys() - needed:
            del self._layouts[old]
        for file in self._models.iterdir():  # those of earlier lives too
            if file.suffix in (".safetensors", ".new") and file.stem not in needed:
                file.unlink(missing_ok=True)
        return layout

    # Towards clients.

    def require_participation(self, organization: str) -> None:
        """Raise when the organization takes part no more, though its token is good for longer."""
        if self._orders is not None and organization in self._orders.revoked:
            raise FedotaError(
                "token_refused", f"The participation of {organization} was revoked. The problem's page says why."
            )

    def model_file(self, sha256: str) -> Path:
        """Where a model lies."""
        return self._models / f"{sha256}.safetensors"

    def has_model(self, sha256: str) -> bool:
        """Whether these weights can be had here."""
        return sha256 in self._layouts

    def has_sent(self, sha256: str, who: Waiting) -> None:
        """A client has got these weights, all of them: if they are what its round begins with, it has begun."""
        if self.cohort is not None and self.cohort.work.base.sha256 == sha256 and self.cohort.begins(who):
            self.changed()

    async def check_in(self, who: Waiting, ticket: Ticket | None) -> CheckedIn:
        """Hold a client until there is something for it to do. `ticket` is of the update that it still keeps."""
        answer = await self._held(who, ticket)
        if ticket is None or isinstance(answer, SendAgain) or answer.update != "over" or ticket.id in self._fates:
            return answer
        fate = await self._asked(ticket)
        if fate is None:
            return msgspec.structs.replace(answer, known=False)
        return msgspec.structs.replace(answer, update=fate)

    async def _held(self, who: Waiting, ticket: Ticket | None) -> CheckedIn:
        if ticket is not None and (answer := await self._unsettled(ticket)) is not None:
            return answer
        if (signed := self._again(who, ticket)) is None and not self._finished and not self._closing:
            if not self.pool.admits(who):
                seconds = self.pace.later(time.monotonic(), who.organization)
                return ComeBack(seconds=seconds, update=self._fate(ticket))
            signed = await self.pool.wait(who, self.pace.hold(), ticket.cohort if ticket else "")
        self.require_participation(who.organization)
        if signed is not None and (selected := self._selected(signed, self._fate(ticket))) is not None:
            return selected
        if self._finished:
            return Finished(reason=self._finished, update=self._fate(ticket))
        return ComeBack(seconds=self._soon(who.organization) if self._closing else 0, update=self._fate(ticket))

    @property
    def _finished(self) -> str:
        return (self._orders.finished or "") if self._orders else ""

    def _again(self, who: Waiting, kept: Ticket | None) -> str | None:
        """The ticket that a client may not have heard of; who keeps another selector's for this cohort needs none."""
        if self.cohort is None or (kept is not None and kept.cohort == self.cohort.id):
            return None
        return self.cohort.unused_ticket(who)

    def _selected(self, signed: str, fate: Fate) -> Selected | None:
        cohort = self.cohort
        if cohort is None or self._orders is None:
            return None
        work = cohort.work
        return Selected(
            ticket=signed,
            round=work.round,
            attempt=work.attempt,
            model=work.base,
            config=self._orders.config,
            seconds=max(0.0, work.deadline - time.time()),
            update=fate,
        )

    def _fate(self, ticket: Ticket | None) -> Fate:
        """What became of an update; `over` also where it may be part of a sum that is not this life's."""
        if ticket is None:
            return "none"
        if (fate := self._fates.get(ticket.id)) is not None:
            return fate
        if self.cohort is not None and self.cohort.id == ticket.cohort:
            return "pending"
        orders = self._orders
        if orders is None or orders.settling or orders.life != self.life:  # said to whom we were
            return "pending"
        if orders.work is not None and orders.work.cohort == ticket.cohort:
            return "pending"
        return "over"

    async def _unsettled(self, ticket: Ticket) -> CheckedIn | None:
        """What to do about an update that the client keeps and that is not in our sum."""
        cohort = self.cohort
        if cohort is None or cohort.id != ticket.cohort:
            if self._fate(ticket) != "pending":
                return None
            return ComeBack(seconds=self._soon(ticket.organization), update="pending")
        upload = cohort.uploads.receiving.get(ticket.id)
        if upload is not None and not await upload.gives_way():
            return None
        if ticket.id in cohort.accepted or cohort.closed:
            return None
        if ticket.life == self.life or ticket.id in cohort.claimed:
            return SendAgain()
        match await self.claim(cohort, ticket):
            case "granted":
                return SendAgain()
            case "wait":
                return ComeBack(seconds=self._soon(ticket.organization), update="pending")
        return None

    def _soon(self, organization: str) -> float:
        return self.pace.soon(time.monotonic(), organization)

    async def _asked(self, ticket: Ticket) -> Fate | None:
        """What the coordinator knows of an update whose cohort is over. Nobody waits for one that does not answer."""
        if not self.connected:
            return None
        try:
            async with asyncio.timeout(_ASKING):
                answer = (await self._link.claim(self._claim_of(ticket))).answer
        except (FedotaError, TimeoutError):
            return None
        fate = _FATES[answer]
        if fate in ("counted", "over"):
            self._keep_fates({ticket.id: fate})
        return fate

    def _claim_of(self, ticket: Ticket) -> Claim:
        return Claim(life=self.life, cohort=ticket.cohort, ticket=ticket.id, name=ticket.selector, issuer=ticket.life)

    async def claim(self, cohort: Cohort, ticket: Ticket) -> str:
        """Ask for the right to accept the update of a ticket that we did not give out."""
        try:
            answer = (await self._link.claim(self._claim_of(ticket))).answer
        except FedotaError:
            return "wait"
        if answer == "granted":
            cohort.claimed[ticket.id] = ticket.life
        return answer

    def close(self) -> None:
        """Hold nobody any more."""
        self._closing = True
        self.pool.dismiss()

    def unsure(self, ticket: Ticket) -> bool:
        """Whether the ticket's cohort may still be going on, for all that we know."""
        return self._fate(ticket) == "pending"

    def counts(self, ticket: Ticket) -> bool:
        """Whether the ticket's update is part of a checkpoint, as far as it is known here."""
        return self._fate(ticket) == "counted"

    def changed(self) -> None:
        """Something is to be told to the coordinator."""
        self._changed.set()
