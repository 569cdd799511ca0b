"""Tickets."""

import jwt
import pytest

from fedota.errors import FedotaError
from fedota.runtime.tickets import Ticket, Tickets

TICKET = Ticket(
    id="1", organization="org", client="c", round=2, attempt=1, cohort="k-2-1", selector="selector-0", life="l"
)


def test_a_ticket_is_read_by_every_selector_of_the_run() -> None:
    """They share the key."""
    assert Tickets("key", "p", 1).read(Tickets("key", "p", 1).sign(TICKET), "org") == TICKET


@pytest.mark.parametrize("other", [("another", "p", 1), ("key", "q", 1), ("key", "p", 2)])
def test_a_ticket_is_good_for_one_run_of_one_problem(other: tuple[str, str, int]) -> None:
    """Signed for anything else it is worth nothing."""
    with pytest.raises(FedotaError, match="not given out for this training"):
        Tickets("key", "p", 1).read(Tickets(*other).sign(TICKET), "org")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no ticket"),
        ("", "has no ticket"),
        ("x", "not given out"),
        (jwt.encode({"id": "1"}, "", algorithm="none"), "not given out"),
        (jwt.encode({"id": "1"}, "k" * 32, algorithm="HS256"), "not given out"),
    ],
)
def test_what_is_no_ticket_is_refused(text: str | None, said: str) -> None:
    """With the same code, whatever is wrong."""
    with pytest.raises(FedotaError, match=said) as raised:
        Tickets("key", "p", 1).read(text, "org")
    assert raised.value.problem.code == "ticket_refused"


def test_a_ticket_is_its_organizations() -> None:
    """Nobody else's token goes with it."""
    tickets = Tickets("key", "p", 1)
    with pytest.raises(FedotaError, match="another organization"):
        tickets.read(tickets.sign(TICKET), "other")
