"""How the reconciler begins, goes on and ends, on hand-written parts."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, cast

import msgspec
import pytest

from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.kernel.bus import Bus
from fedota.kernel.database import Pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from services.orchestrator import reconciler
from services.orchestrator.domain import Infra, Spec, State
from services.orchestrator.launchers import Change
from services.orchestrator.projection import PROJECTION
from services.orchestrator.reconciler import Reconciler
from tests.unit.orchestrator.test_domain import ID, INFRA, SPAWNED


class Rows:
    """A read model of one problem whose infrastructure should run; the database can be out of reach."""

    def __init__(self) -> None:
        self.state = SPAWNED
        self.faults: list[Exception] = []

    async def fetch(self, *_: Any) -> list[dict[str, str]]:
        """Every list of problems."""
        if self.faults:
            raise self.faults.pop()
        return [{"problem_id": ID}]

    async def fetchval(self, *_: Any) -> str:
        """The problem's state."""
        return to_json(self.state).decode()


class Head:
    """A log of one event."""

    async def head(self) -> int:
        """Its position."""
        return 1


class Backend:
    """A launcher that can fail; what it launches answers at once."""

    def __init__(self) -> None:
        self.infra: Infra | None = None
        self.faults: list[Exception] = []
        self.launched = asyncio.Event()
        self.stopped = asyncio.Event()
        self.over = False

    async def launch(self, spec: Spec) -> Infra:
        """Fail as often as there are faults."""
        if self.faults:
            raise self.faults.pop()
        assert self.infra is None, "launched twice"
        self.infra = msgspec.structs.replace(INFRA, run=spec.run)
        self.launched.set()
        return self.infra

    async def stop(self, namespace: str) -> None:
        """Only what is over should be stopped."""
        assert self.over, namespace
        self.infra = None
        self.stopped.set()

    async def namespaces(self) -> list[str]:
        """What exists."""
        return [self.infra.namespace] if self.infra else []

    async def find(self, namespace: str) -> Infra | None:
        """The same."""
        return self.infra

    async def watch(self) -> AsyncIterator[Change]:
        """Nothing changes."""
        await asyncio.Event().wait()
        yield Change(namespace=INFRA.namespace)

    async def check(self) -> None:
        """Never asked."""


class World:
    """A reconciler and its parts."""

    def __init__(self, farewell: float = 0.0) -> None:
        self.rows, self.backend = Rows(), Backend()
        pool, log = cast("Pool", self.rows), cast("EventLog", Head())
        self.projector = Projector(PROJECTION, pool, log, cast("Bus", None))
        self.task = asyncio.create_task(
            Reconciler(pool, log, self.projector, self.backend, lambda: None, farewell).run(), name="reconciler"
        )

    async def is_over(self, state: State) -> None:
        """What runs is to be removed by this state, and it was looked at since."""
        await self.projector._move(1)
        await asyncio.wait_for(self.backend.launched.wait(), 5)
        self.backend.launched.clear()
        self.rows.state, self.backend.over = state, True
        await self.projector._move(2)
        await _rest()

    async def end(self) -> None:
        """It must end when it is told to once."""
        self.task.cancel()
        await asyncio.wait([self.task], timeout=5)
        assert self.task.cancelled()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Looks at everything often."""
    monkeypatch.setattr(reconciler, "_EVERY", 0.01)
    return World()


async def _rest() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_nothing_is_done_before_the_read_model_has_caught_up(world: World) -> None:
    """What an earlier life said might be done or said again."""
    await _rest()
    assert world.backend.infra is None
    await world.projector._move(1)
    await asyncio.wait_for(world.backend.launched.wait(), 5)
    await world.end()


@pytest.mark.parametrize("fault", [FedotaError("unavailable"), OSError("no space left"), RuntimeError("unforeseen")])
async def test_what_fails_is_tried_again(world: World, fault: Exception) -> None:
    """Whatever it was, and without anybody's help."""
    world.backend.faults = [fault, fault]
    world.rows.faults = [OSError("no database")]
    await world.projector._move(1)
    await asyncio.wait_for(world.backend.launched.wait(), 5)
    assert world.backend.faults == world.rows.faults == []
    await world.end()


_OVER = msgspec.structs.replace(SPAWNED, wanted=False)


async def test_what_is_over_stays_up_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """For clients that come late; it is removed right after that, and not at the next look."""
    monkeypatch.setattr(reconciler, "_EVERY", 60)
    world, began = World(farewell=0.2), monotonic()
    await world.is_over(_OVER)
    await asyncio.wait_for(world.backend.stopped.wait(), 5)
    assert monotonic() - began >= 0.2
    await world.end()


async def test_looks_do_not_make_it_stay_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often somebody looks at it meanwhile."""
    monkeypatch.setattr(reconciler, "_EVERY", 0.01)
    world = World(farewell=0.2)
    await world.is_over(_OVER)
    await asyncio.wait_for(world.backend.stopped.wait(), 5)
    await world.end()


async def test_a_new_start_does_not_wait_for_the_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before is removed at once."""
    monkeypatch.setattr(reconciler, "_EVERY", 60)
    world = World(farewell=60)
    await world.is_over(_OVER)
    assert not world.backend.stopped.is_set()
    world.rows.state = msgspec.structs.replace(SPAWNED, run=3)
    await world.projector._move(3)
    await asyncio.wait_for(world.backend.launched.wait(), 5)
    assert world.backend.stopped.is_set()
    await world.end()


async def test_a_farewell_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the orchestrator: what runs ends with it."""
    monkeypatch.setattr(reconciler, "_EVERY", 60)
    world = World(farewell=60)
    await world.is_over(_OVER)
    await world.end()
    assert not world.backend.stopped.is_set()


@pytest.mark.parametrize("ticks", range(4))
async def test_it_ends_when_told_to_even_as_news_comes(
    world: World, ticks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation must not get lost in a wait that succeeds at the same moment."""
    monkeypatch.setattr(reconciler, "_EVERY", 60)
    await world.projector._move(1)
    await asyncio.wait_for(world.backend.launched.wait(), 5)
    await _rest()
    await world.projector._move(2)
    for _ in range(ticks):
        await asyncio.sleep(0)
    await world.end()
