"""Tickets: a selected client's right to send one update, signed so that any selector of the problem can check it."""

import hashlib
import hmac
from typing import Final

import jwt
import msgspec

from fedota.errors import FedotaError

_ALGORITHM: Final = "HS256"


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """`id` is unique. `selector` and `life` gave it out, for one cohort: the clients of one attempt of a round.

    `issued` when (Unix seconds); 0 is unknown.
    """

    id: str
    organization: str
    client: str
    round: int
    attempt: int
    cohort: str
    selector: str
    life: str
    issued: float = 0.0


class Tickets:
    """Signs and checks the tickets of one run of a problem."""

    def __init__(self, key: str, problem_id: str, run: int) -> None:
        # The shared key also opens the coordinator's doors: what signs tickets is derived, and bound to the run.
        self._key = hmac.digest(key.encode(), f"ticket/{problem_id}/{run}".encode(), hashlib.sha256)

    def sign(self, ticket: Ticket) -> str:
        """The ticket as it is handed to a client."""
        return jwt.encode(msgspec.to_builtins(ticket), self._key, algorithm=_ALGORITHM)

    def read(self, text: str | None, organization: str) -> Ticket:
        """The ticket, if it is ours and `organization`'s. Raises `ticket_refused`."""
        if not text:
            raise FedotaError("ticket_refused", "The request has no ticket. Check in to be selected.")
        try:
            ticket = msgspec.convert(jwt.decode(text, self._key, algorithms=[_ALGORITHM]), Ticket)
        except (jwt.InvalidTokenError, msgspec.ValidationError):
            raise FedotaError(
                "ticket_refused", "The ticket was not given out for this training. Check in again."
            ) from None
        if ticket.organization != organization:
            raise FedotaError("ticket_refused", "The ticket was given to another organization. Check in again.")
        return ticket
