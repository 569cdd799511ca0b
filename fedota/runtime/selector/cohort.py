"""The selector's part in one cohort: the tickets it gave out, and the running sum of what came back."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fedota.errors import FedotaError
from fedota.events.rounds import Refusal
from fedota.runtime.aggregation import WeightedSum, Weights, clipped, sum_size
from fedota.runtime.contributions import Contributions
from fedota.runtime.places import opened
from fedota.runtime.protocol import Accepted, Held, Meta, Work
from fedota.runtime.rooms import Rooms
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.tensors import Layout
from fedota.runtime.tickets import Ticket
from fedota.runtime.uploads import Uploads

MOST_REFUSALS: Final = 50
MOST_WORDS: Final = 500  # characters of each


class SumLostError(Exception):
    """An update broke off while it was added: the sum holds it by half, and is of no use any more."""


class Cohort:
    """Counts each ticket at most once. The sum is touched only by updates that were checked, one after the other.

    `base` is the file of the weights that the round begins with: updates are clipped around them. The sum's memory is
    taken from `rooms`.
    """

    def __init__(self, work: Work, layout: Layout, base: Path | None = None, rooms: Rooms | None = None) -> None:
        self.work = work
        self.layout = layout
        self.base = base
        self.selected: int | None = None
        self.closed = bool(work.collect)
        self.handed = ""  # the collection that the sum was handed over to
        self.issued: dict[Waiting, str] = {}
        self.accepted: dict[str, Accepted] = {}
        self.uploads = Uploads()
        self.claimed: dict[str, str] = {}  # tickets of other lives that may be accepted here, and the lives
        self.refusals: list[Refusal] = []
        self._begun: set[Waiting] = set()  # of those who were selected here
        self._sum: WeightedSum | None = None
        self._rooms = rooms or Rooms()
        self._contributions = Contributions()
        self.lock = asyncio.Lock()

    @property
    def id(self) -> str:
        """Which cohort this is."""
        return self.work.cohort

    @property
    def numbers(self) -> memoryview:
        """The sum's bytes."""
        return self._sum.numbers if self._sum else memoryview(b"")

    def require_open(self, ticket: Ticket) -> None:
        """Raise unless an update with this ticket would be accepted now."""
        if ticket.id in self.accepted:
            raise already_reported()
        if self.closed:
            raise _round_over()

    def unused_ticket(self, who: Waiting) -> str | None:
        """The ticket that a client got and has not used: perhaps it never heard of it."""
        return None if self.closed else self.issued.get(who)

    def begins(self, who: Waiting) -> bool:
        """Note that a client has the model, if it was selected here; whether that is news."""
        if who not in self.issued or who in self._begun:
            return False
        self._begun.add(who)
        return True

    async def count(
        self,
        ticket: Ticket,
        update: Weights,
        examples: int,
        metrics: dict[str, float],
        require_participation: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Add a checked update. Raises `round_over` when the cohort was closed meanwhile.

        `require_participation` is asked when its turn has come, which may be long after it was sent. After
        `SumLostError` nothing is left of the sum, and nothing more is taken.
        """
        arrived, weight = time.time(), min(examples, self.work.examples_per_update or examples)
        async with self.lock:
            if ticket.id in self.accepted:  # sent twice, each time by a client that did not wait for the answer
                raise already_reported()
            if self.closed:
                raise _round_over()
            require_participation(ticket.organization)
            is_clipped = await self._added(update, weight)
            self.accepted[ticket.id] = accepted = Accepted(
                ticket=ticket.id,
                organization=ticket.organization,
                examples=weight,
                metrics=metrics,
                size=update.body.received,
                seconds=round(max(0.0, arrived - ticket.issued), 3) if ticket.issued else 0.0,
                clipped=is_clipped,
            )
            self._contributions.accept(accepted)
            who = Waiting(ticket.organization, ticket.client)
            self.begins(who)  # wherever it has the model from
            self.issued.pop(who, None)

    async def _added(self, update: Weights, weight: int) -> bool:
        try:
            return await asyncio.to_thread(self._add, update, weight)
        except FedotaError:
            raise  # nothing was added yet
        except Exception as error:  # whatever it was, half of the update may be in the sum: nobody may have that
            self.closed, self._sum = True, None
            self.accepted.clear()
            raise SumLostError(str(error) or type(error).__name__) from error

    def _add(self, update: Weights, weight: int) -> bool:
        """Add it; whether it was clipped."""
        if self._sum is None:
            self._sum = WeightedSum(self.layout, self._rooms.room(sum_size(self.layout)))
        if self.work.clip_norm is None or self.base is None:
            self._sum.add(update, weight)
            return False
        with ExitStack() as stack:
            try:
                base = stack.enter_context(opened(self.base))
            except OSError as error:  # too many files are open, or the cohort was dropped meanwhile
                why = f"The round's weights could not be opened ({error.strerror}). Send the update again."
                raise FedotaError("unavailable", why, retry_after=1) from error
            step = clipped(update, Weights(self.layout, base), self.work.clip_norm)
            self._sum.add(step, weight)
        return step is not update

    def refuse(self, organization: str, error: FedotaError) -> None:
        """Note an update that does not count."""
        self._contributions.refuse(organization, error.problem.code)
        if len(self.refusals) < MOST_REFUSALS:
            problem = error.problem
            detail = (problem.detail or problem.title)[:MOST_WORDS]  # what was sent may be quoted in it
            self.refusals.append(Refusal(organization=organization, code=problem.code, detail=detail))

    def held(self) -> Held:
        """What the coordinator is told of it."""
        return Held(
            cohort=self.work.cohort,
            round=self.work.round,
            attempt=self.work.attempt,
            base=self.work.base.sha256,
            share=self.work.share,
            shares=self.work.shares,
            deadline=self.work.deadline,
            selected=self.selected,
            begun=len(self._begun),
            reported=len(self.accepted),
            contributions=self._contributions.told,
            refusals=list(self.refusals),
            claimed={ticket: life for ticket, life in self.claimed.items() if ticket in self.accepted},
            closed=self.closed and not self.lock.locked(),  # an update that is being added still counts
        )

    def meta(self, life: str, collection: str) -> Meta:
        """What goes before the numbers."""
        accepted = list(self.accepted.values())
        return Meta(cohort=self.work.cohort, life=life, collection=collection, accepted=accepted)


def already_reported(why: str = "This update was sent before; it counts once.") -> FedotaError:
    """The error that an update is in a sum, or on its way."""
    return FedotaError("already_reported", f"{why} Check in with its ticket.")


def _round_over() -> FedotaError:
    return FedotaError("round_over", "The round takes no more updates. Check in for the next one.")
