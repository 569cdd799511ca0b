"""What clients were told: the side of the story that the log must agree with."""

from typing import NamedTuple
from uuid import UUID

from fedota.contracts.commands import Reply
from fedota.kernel.event_log import Append, Appended


class Ack(NamedTuple):
    """An append that was accepted: these events, the last of them at this position and version of its stream."""

    key: str
    subject: str
    ids: tuple[UUID, ...]
    position: int
    version: int


class Done(NamedTuple):
    """A command that was answered: the key by which the log knows it, and the position that the answer names."""

    key: str
    actor: str
    position: int


class Ledger:
    """Every attempt, and every promise. A second promise for one key must be the first one again."""

    def __init__(self) -> None:
        self.tried: dict[str, Append] = {}
        self.acks: dict[str, Ack] = {}
        self.done: dict[str, Done] = {}

    def tries(self, append: Append) -> None:
        """It may be in the log from now on."""
        self.tried[append.key] = append

    def accepts(self, append: Append, answer: Appended) -> None:
        """The log said that it has it."""
        ids = tuple(event.id for event in append.events)
        ack = Ack(append.key, append.subject, ids, answer.position, answer.version)
        assert self.acks.setdefault(append.key, ack) == ack, "the same append was answered in two ways"

    def replies(self, actor: str, key: str, reply: Reply) -> None:
        """A service said that it is done."""
        done = Done(f"{actor}/{key}", actor, reply.position)
        assert self.done.setdefault(done.key, done) == done, "the same command was answered in two ways"
