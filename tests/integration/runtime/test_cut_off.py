"""A coordinator ahead of what could be recorded: NATS or the object store is away, and it is killed meanwhile."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from fedota.events.problems import Plan
from tests.integration.runtime.conftest import (
    Participant,
    Weights,
    World,
    assert_same,
    running,
    until,
    weighted_mean,
)


def model() -> Weights:
    """Small weights."""
    return {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}


def plan(**changes: Any) -> Plan:
    """Three clients a round, all of them needed."""
    usual: dict[str, Any] = {"rounds": 5, "goal_count": 3, "minimum_fraction": 1.0}
    return Plan(**{**usual, **changes})


def people(*, free: bool = True) -> list[Participant]:
    """Three clients."""
    return [Participant(number, free=free) for number in (1, 2, 3)]


class Line:
    """The coordinator's way to NATS, which can be cut."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> None:
        """Let everything through, at the same address as before."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """End what is connected, and let nobody connect."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there_reader, there_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
        try:
            await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
        finally:
            writer.transport.abort()
            there_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def line(world: World) -> AsyncIterator[Line]:
    """The world's coordinator reaches NATS by this."""
    made = Line(world.nats_url)
    await made.open()
    world.nats_url = f"nats://127.0.0.1:{made.port}"
    try:
        yield made
    finally:
        await made.cut()


async def ahead(world: World, count: int) -> None:
    """So many rounds count that are not recorded yet."""
    async with asyncio.timeout(30):
        while (await world.metrics(world.coordinator))["fedota_rounds_unrecorded"] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # what is waited for is in another process


def assert_trained(world: World, rounds: int, *clients: Participant, again: bool = False) -> None:
    """Each round completed at its first attempt with every update once, told in order, its checkpoint stored first."""
    platform = world.platform
    assert platform.final is not None and platform.final.round == rounds
    assert {one.attempt for one in platform.reports} == {1}
    assert [one.report for one in platform.reports] == list(range(1, len(platform.reports) + 1))
    completed = [one for one in platform.reports if one.stage == "completed"]
    assert [one.round for one in completed] == list(range(1, rounds + 1))
    total = sum(one.number for one in clients)
    assert {(one.reported, one.examples) for one in completed} == {(len(clients), total)}
    weights = world.model
    for one in completed:
        weights = weighted_mean([(client.trained(weights, one.round), client.number) for client in clients])
        assert_same(platform.weights(one), weights, relative=1e-5)
        assert platform.manifest(one)["round"] == one.round
    if not again:
        assert [one.rounds for one in clients] == [list(range(1, rounds + 1)) for _ in clients], "nobody trained twice"


async def test_without_nats_training_goes_on_and_all_is_told_afterwards(world: World, tmp_path: Path) -> None:
    """Round after round; when NATS is back the checkpoints are stored and every report is recorded in order."""
    clients = people()
    async with line(world) as nats:
        await world.launch(plan(), model())
        # both selectors were heard of, and there is nothing more to report until somebody comes
        await until(lambda: world.platform.reports[-1:] and "clients are here" in world.platform.reports[-1].reason)
        await nats.cut()
        recorded = len(world.platform.reports)
        async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
            await ahead(world, 5)
            assert len(world.platform.reports) == recorded and world.store.puts == []
            assert not any(one.said("The training is finished.") for one in clients), "a crash would need them again"
            await nats.open()
            await until(lambda: world.platform.final)
    assert_trained(world, 5, *clients)


async def test_killed_while_nats_is_away(world: World, tmp_path: Path) -> None:
    """It goes on where it was: what it was ahead is in its journal, what was going on is with its selectors."""
    clients = people(free=False)
    async with line(world) as nats:
        await world.launch(plan(rounds=4), model())
        await until(lambda: world.platform.reports)
        async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
            await until(lambda: all(one.rounds for one in clients))
            await nats.cut()
            for round_ in (1, 2):
                for one in clients:
                    one.go()
                await ahead(world, round_)
                await until(lambda: all(one.rounds[-1:] == [round_ + 1] for one in clients))  # noqa: B023
            clients[0].go()
            await until(lambda: clients[0].said("round 3: the update has arrived"))
            await world.coordinator.kill()
            await world.coordinator.start(wait=False)
            await nats.open()
            await world.coordinator.answers()
            assert "going on from the journal" in world.coordinator.log()
            for one in (*clients[1:], *clients):
                one.go()
            await until(lambda: world.platform.final)
    assert_trained(world, 4, *clients)


async def test_nats_is_away_when_a_coordinator_begins(world: World) -> None:
    """It says so, and begins as soon as somebody answers."""
    async with line(world) as nats:
        await nats.cut()
        world.prepare(plan(), model())
        await world.coordinator.start(wait=False)
        await world.coordinator.listens()
        said = await world.coordinator.says("NATS")
        assert said == "NATS cannot be reached (ConnectionRefusedError); it is tried again."
        await nats.open()
        await world.coordinator.answers()


async def test_killed_again_and_again_while_checkpoints_cannot_be_stored(world: World, tmp_path: Path) -> None:
    """Not one of the rounds that counted is done over."""
    clients = people(free=False)
    await world.launch(plan(rounds=4), model())
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        world.store.failing = True
        for round_ in (1, 2, 3):
            for one in clients:
                one.go()
            await ahead(world, round_)
            await world.coordinator.kill()
            await world.coordinator.start()
            await ahead(world, round_)
        assert [one for one in world.platform.reports if one.stage == "completed"] == []
        await until(lambda: "the checkpoint is being stored" in world.platform.reports[-1].reason)
        world.store.failing = False
        for one in clients:
            one.go()
        await until(lambda: world.platform.final)
    assert_trained(world, 4, *clients)
    assert all(one.said(f"round {number}: your update counts") for one in clients for number in (1, 2, 3))


async def test_a_training_that_is_too_far_ahead_waits(world: World, tmp_path: Path) -> None:
    """No more than sixteen rounds are only on the coordinator's own disk; it says so and goes on when it can."""
    clients = people()
    await world.launch(plan(rounds=18), model())
    world.store.failing = True
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await ahead(world, 16)
        await until(lambda: "16 rounds are not recorded yet" in world.coordinator.log())
        await until(lambda: "15 rounds are waiting behind it" in world.platform.reports[-1].reason)
        assert {one.rounds[-1] for one in clients} == {16}
        world.store.failing = False
        await until(lambda: world.platform.final)
    assert_trained(world, 18, *clients)
    models, manifests = (world.coordinator.directory / name for name in ("models", "checkpoints"))
    await until(lambda: len(list(models.glob("*.safetensors"))) <= 2)  # what is recorded is not kept
    await until(lambda: list(manifests.iterdir()) == [])


async def test_killed_and_its_directory_lost(world: World, tmp_path: Path) -> None:
    """Then it goes on from the log: the rounds that only it knew are done again."""
    clients = people()
    await world.launch(plan(rounds=4), model())
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: world.platform.completed(1))
        world.store.failing = True
        await until(lambda: all(one.rounds[-1] == 4 for one in clients))
        await world.coordinator.kill()
        shutil.rmtree(world.coordinator.directory)
        world.store.failing = False
        await world.coordinator.start()
        await until(lambda: world.platform.final)
    assert_trained(world, 4, *clients, again=True)
    assert max(map(len, (one.rounds for one in clients))) > 4


async def test_a_checkpoint_that_was_damaged_is_computed_again(world: World, tmp_path: Path) -> None:
    """After a machine lost its power, say: the journal speaks of it, the log is right."""
    clients = people()
    await world.launch(plan(rounds=2), model())
    world.store.failing = True
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await ahead(world, 2)
        await world.coordinator.kill()
        newest = max(
            (world.coordinator.directory / "models").glob("*.safetensors"), key=lambda path: path.stat().st_mtime
        )
        newest.write_bytes(bytes(newest.stat().st_size))
        world.store.failing = False
        await world.coordinator.start()
        await until(lambda: world.platform.final)
    assert "the log alone says where to go on" in world.coordinator.log()
    assert_trained(world, 2, *clients, again=True)


async def test_a_log_that_went_on_without_it_ends_the_coordinator(world: World, tmp_path: Path) -> None:
    """What an earlier life had sent was recorded after all: whoever starts it again has it go on from there."""
    clients = people(free=False)
    await world.launch(plan(rounds=2), model())
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: all(one.rounds for one in clients))
        await until(lambda: world.platform.reports[-1].stage == "reporting")
        last = world.platform.reports[-1]
        world.platform.reports.append(msgspec.structs.replace(last, report=last.report + 1, reason="a stray one"))
        clients[0].go()
        assert await asyncio.wait_for(world.coordinator.process.wait(), 20) == 1
        await world.coordinator.start()
        for one in (*clients[1:], *clients):
            one.go()
        await until(lambda: world.platform.final)
    assert_trained(world, 2, *clients)
