"""The selector's part in one cohort: the tickets it gave out, and the running sum of what came back."""

import asyncio
from collections.abc import Mapping
from typing import Final

from fedota.errors import FedotaError
from fedota.events.rounds import Refusal
from fedota.runtime.aggregation import WeightedSum
from fedota.runtime.protocol import Accepted, Held, Meta, Work
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.tensors import Array, Layout
from fedota.runtime.tickets import Ticket

MOST_REFUSALS: Final = 50


class Cohort:
    """Counts each ticket at most once. The sum is touched only by updates that were checked, one after the other."""

    def __init__(self, work: Work, layout: Layout) -> None:
        self.work = work
        self.layout = layout
        self.selected: int | None = None
        self.closed = bool(work.collect)
        self.handed = ""  # the collection that the sum was handed over to
        self.issued: dict[Waiting, str] = {}
        self.accepted: dict[str, Accepted] = {}
        self.receiving: set[str] = set()
        self.claimed: set[str] = set()
        self.refusals: list[Refusal] = []
        self._sum: WeightedSum | None = None
        self._examples = 0
        self._organizations: set[str] = set()
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
        if ticket.id in self.accepted or ticket.id in self.receiving:
            raise _already_reported()
        if self.closed:
            raise _round_over()

    def unused_ticket(self, who: Waiting) -> str | None:
        """The ticket that a client got and has not used: perhaps it never heard of it."""
        return None if self.closed else self.issued.get(who)

    async def count(
        self, ticket: Ticket, update: Mapping[str, Array], examples: int, metrics: dict[str, float]
    ) -> None:
        """Add a checked update. Raises `round_over` when the cohort was closed meanwhile."""
        async with self.lock:
            if ticket.id in self.accepted:  # sent twice, each time by a client that did not wait for the answer
                raise _already_reported()
            if self.closed:
                raise _round_over()
            await asyncio.to_thread(self._add, update, examples)
            self.accepted[ticket.id] = Accepted(
                ticket=ticket.id, organization=ticket.organization, examples=examples, metrics=metrics
            )
            self._examples += examples
            self._organizations.add(ticket.organization)
            self.issued.pop(Waiting(ticket.organization, ticket.client), None)

    def _add(self, update: Mapping[str, Array], examples: int) -> None:
        self._sum = self._sum or WeightedSum(self.layout)
        self._sum.add(update, examples)

    def refuse(self, organization: str, error: FedotaError) -> None:
        """Note an update that does not count."""
        if len(self.refusals) < MOST_REFUSALS:
            problem = error.problem
            self.refusals.append(
                Refusal(organization=organization, code=problem.code, detail=problem.detail or problem.title)
            )

    def held(self) -> Held:
        """What the coordinator is told of it."""
        return Held(
            cohort=self.work.cohort,
            round=self.work.round,
            attempt=self.work.attempt,
            base=self.work.base.sha256,
            share=self.work.share,
            deadline=self.work.deadline,
            selected=self.selected,
            reported=len(self.accepted),
            examples=self._examples,
            organizations=sorted(self._organizations),
            refusals=list(self.refusals),
            claimed=sorted(self.claimed & self.accepted.keys()),
            closed=self.closed,
        )

    def meta(self, life: str) -> Meta:
        """What goes before the numbers."""
        return Meta(cohort=self.work.cohort, life=life, accepted=list(self.accepted.values()))


def _already_reported() -> FedotaError:
    return FedotaError("already_reported", "This update was sent before; it counts once.")


def _round_over() -> FedotaError:
    return FedotaError("round_over", "The round takes no more updates. Check in for the next one.")
