"""Whose update comes next: few come at once, and no organization keeps the others out."""

import asyncio
from collections import deque

from fedota.runtime.portions import Portions


class Turns:
    """So many turns. A free one goes to the organization that has fewest, among equals to each in turn.

    Within an organization it is first come, first served.
    """

    def __init__(self, most: int) -> None:
        self._portions = Portions(most)
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # served latest: last

    async def take(self, organization: str) -> None:
        """Return when it is one's turn; `give_back` ends it."""
        if organization not in self._waiting and self._portions.admits(organization):
            self._portions.take(organization)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(organization, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(organization, turn)
            else:  # it came in the very moment in which its waiting ended
                self.give_back(organization)
            raise

    def give_back(self, organization: str) -> None:
        """A turn has ended: the next begins."""
        self._portions.give_back(organization)
        while self._waiting:
            chosen = min(self._waiting, key=self._portions.held)
            if not self._portions.admits(chosen):  # then nobody else is, who has as much or more
                return
            queue = self._waiting.pop(chosen)
            turn = queue.popleft()
            if queue:
                self._waiting[chosen] = queue
            if not turn.done():
                self._portions.take(chosen)
                turn.set_result(None)

    def _forget(self, organization: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(organization, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[organization]
