"""Faults by name: a moment of a round, and what happens to a process or a line in that moment."""

import asyncio
import random
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Final, Literal, NamedTuple

from fedota.events.rounds import RoundUpdated
from tests.faults.rounds.processes import Kept
from tests.faults.rounds.training import Training
from tests.faults.rounds.wires import Connection, Trap, Way, Wire
from tests.faults.servers import Server

_SHORT: Final = 1.5  # seconds, at most
_LONG: Final = 17.0  # seconds: a selector that is silent for 15 is taken for dead
Line = Literal["clients", "coordinator", "store"]


class Moment(NamedTuple):
    """A moment in which something certain passes on a line: before it does, in its middle, or before its answer."""

    line: Line
    words: re.Pattern[bytes]
    halfway: bool = False
    answered: bool = False


_CHECK_IN: Final = re.compile(rb"POST /v1/check-in")
_MODEL: Final = re.compile(rb"GET /v1/models/")
_UPDATE: Final = re.compile(rb"POST /v1/updates")
_STATE: Final = re.compile(rb"POST /v1/selectors/")
_SUM: Final = re.compile(rb"(PUT|PATCH) /v1/selectors/")
_CHECKPOINT: Final = re.compile(rb"PUT /\S+\.safetensors")
MOMENTS: Final = {
    "selection": Moment("clients", _CHECK_IN),
    "configuration": Moment("clients", _CHECK_IN, answered=True),
    "telling": Moment("coordinator", _STATE),
    "fetching": Moment("clients", _MODEL),
    "reporting": Moment("clients", _UPDATE),
    "half an update": Moment("clients", _UPDATE, halfway=True),
    "accepted": Moment("clients", _UPDATE, answered=True),
    "collecting": Moment("coordinator", _SUM),
    "half a sum": Moment("coordinator", _SUM, halfway=True),
    "aggregating": Moment("coordinator", _SUM, answered=True),
    "storing": Moment("store", _CHECKPOINT),
    "half a checkpoint": Moment("store", _CHECKPOINT, halfway=True),
    "stored": Moment("store", _CHECKPOINT, answered=True),
}
REPORTED: Final = ("completed", "recorded")  # the report has come; it is recorded and not answered
DEEDS: Final = (
    "coordinator killed",
    "coordinator paused",
    "selector killed",
    "selector paused",
    "coordinator and selectors killed",
    "client killed",
    "client paused",
    "nats killed",
    "nats paused",
    "s3 killed",
    "s3 paused",
    "line reset",
    "line silent",
    "line half-closed",
    "line slow",
    "wire cut",
    "wire silent",
)


class Fault(NamedTuple):
    """What is to happen when."""

    moment: str
    deed: str

    def __str__(self) -> str:
        return f"{self.deed} at {self.moment}"


def some_faults(
    chance: random.Random,
    count: int,
    *,
    without: str | None = None,
    among: Collection[str] = (*MOMENTS, *REPORTED),
) -> list[Fault]:
    """So many faults: each moment comes before any again, as does each deed, and all pairs before any pair again.

    `without` is a deed that is left out; `among` are the moments.
    """
    moments, deeds = list(among), [deed for deed in DEEDS if deed != without]
    chance.shuffle(moments)
    chance.shuffle(deeds)
    pairs: list[Fault] = []
    for turn in range(len(deeds)):
        pairs += [Fault(moment, deeds[(turn + place) % len(deeds)]) for place, moment in enumerate(moments)]
    return (pairs * (count // len(pairs) + 1))[:count]


class Faults:
    """Makes faults in a training, each with the pauses that its chance gives.

    Who is `patient` makes some of them longer than a selector may be silent.
    """

    def __init__(self, training: Training, chance: random.Random, *, patient: bool = False) -> None:
        self._training = training
        self._chance = chance
        self._patient = patient
        self._down: set[Server] = set()
        self._mending: set[asyncio.Task[None]] = set()
        self._failures: list[Exception] = []

    async def make(self, fault: Fault) -> None:
        """Make it in its moment, whenever that comes, and return once all is mended that it broke."""
        sprung = self._set(fault)
        await self._training.comes_to(f"{fault}", sprung.is_set)
        await self.mended()

    def _set(self, fault: Fault) -> asyncio.Event:
        if fault.moment in REPORTED:
            return self._wait_for_report(fault)
        moment = MOMENTS[fault.moment]

        async def spring(connection: Connection, way: Way) -> None:
            for wire in wires:
                wire.trap = None
            await self._do(fault.deed, connection, way)

        after = self._training.model_size // 2 if moment.halfway else 0
        trap = Trap(moment.words, spring, after=after, answered=moment.answered)
        wires = self._wires(moment.line)
        for wire in wires:
            wire.trap = trap
        return trap.sprung

    def _wait_for_report(self, fault: Fault) -> asyncio.Event:
        sprung, recorder = asyncio.Event(), self._training.recorder

        async def look(report: RoundUpdated) -> None:
            if report.stage == "completed" and not sprung.is_set():
                sprung.set()
                await self._do(fault.deed, self._chance.choice(self._training.bus.connections or [None]), "back")

        if fault.moment == "completed":
            recorder.before = look
        else:
            recorder.after = look
        return sprung

    def _wires(self, line: Line) -> list[Wire]:
        training = self._training
        return {"clients": training.client_wires, "coordinator": training.lines, "store": [training.store]}[line]

    async def do(self, deed: str) -> None:
        """Make it at once, to whoever chance picks."""
        connections = [one for wire in self._training.wires for one in wire.connections]
        await self._do(deed, self._chance.choice(connections) if connections else None, self._way())

    def _way(self) -> Way:
        return "there" if self._chance.random() < 0.5 else "back"

    async def _do(self, deed: str, connection: Connection | None, way: Way) -> None:
        try:
            self._begin(deed, connection, way)
        except Exception as error:  # whoever waits for what passes must not be the one who hears of it
            self._failures.append(error)
        await asyncio.sleep(0)  # what was begun is done before anything passes

    def _begin(self, deed: str, connection: Connection | None, way: Way) -> None:
        who, _, what = deed.rpartition(" ")
        if who in ("line", "wire"):
            if connection is not None:
                self._cut(connection.wire, what) if who == "wire" else self._disturb(connection, way, what)
            return
        for victim in self._victims(who, connection):
            if isinstance(victim, Server):
                self._mend(self._restart(victim) if what == "killed" else self._hold(victim))
            elif what == "killed":
                victim.kill(self._pause())
                self._mend(self._back(victim, victim.lives))
            else:
                self._mend(self._hold(victim))

    def _victims(self, who: str, connection: Connection | None) -> Sequence[Kept | Server]:
        """Those at the ends of the connection where it is theirs, else any."""
        training, wire = self._training, connection.wire if connection else None
        match who:
            case "coordinator":
                return [training.coordinator]
            case "coordinator and selectors":
                return [training.coordinator, *training.selectors]
            case "selector":
                there = [one for one in training.selectors if wire is not None and one.name in wire.name]
                return [self._chance.choice(there or training.selectors)]
            case "client":
                own = [party.process for party in training.parties if wire in party.wires]
                return [self._chance.choice(own or [party.process for party in training.parties])]
            case "nats":
                return [training.around.nats]
            case "s3":
                return [training.around.s3]
        raise AssertionError(who)

    def _cut(self, wire: Wire, what: str) -> None:
        """For a while, all connections on it."""
        wire.cut(silently=what == "silent")
        self._mend(self._later(self._long_pause(), wire.mend))

    def _disturb(self, connection: Connection, way: Way, what: str) -> None:
        match what:
            case "reset":
                for other in self._beside(connection):  # what is sent again comes in the middle of what they send
                    self._slow_down(other)
                connection.reset()
            case "silent":
                connection.swallow()
                self._mend(self._later(self._pause(), connection.reset))
            case "half-closed":
                connection.half_close(way)
                self._mend(self._later(_SHORT, connection.reset))
            case "slow":
                self._slow_down(connection)

    def _slow_down(self, connection: Connection) -> None:
        connection.slow_down(self._pause() / 10)
        self._mend(self._later(_SHORT, lambda: connection.slow_down(0)))

    def _beside(self, connection: Connection) -> list[Connection]:
        """The other connections on lines of the same kind."""
        training = self._training
        for wires in (training.client_wires, training.lines, [training.bus], [training.store]):
            if connection.wire in wires:
                return [one for wire in wires for one in wire.connections if one is not connection]
        raise AssertionError(connection.wire.name)

    def _pause(self) -> float:
        return self._chance.uniform(0.05, _SHORT)

    def _long_pause(self) -> float:
        return _LONG if self._patient and self._chance.random() < 0.1 else self._pause()

    async def _hold(self, victim: Kept | Server) -> None:
        victim.pause()
        try:
            await asyncio.sleep(self._long_pause())
        finally:
            victim.resume()

    async def _restart(self, server: Server) -> None:
        if server in self._down:
            return
        self._down.add(server)
        await server.kill()
        await asyncio.sleep(self._pause())
        await server.start()
        self._down.discard(server)

    async def _back(self, victim: Kept, life: int) -> None:
        await self._training.comes_to(f"{victim.name} is started again", lambda: victim.lives > life)

    async def _later(self, seconds: float, act: Callable[[], None]) -> None:
        await asyncio.sleep(seconds)
        act()

    def _mend(self, work: Coroutine[Any, Any, None]) -> None:
        self._mending.add(asyncio.create_task(work))

    async def mended(self) -> None:
        """Return when nothing is broken any more that was broken by a fault."""
        while self._mending:
            done, self._mending = self._mending, set()
            await asyncio.gather(*done)
        assert self._failures == [], self._failures
