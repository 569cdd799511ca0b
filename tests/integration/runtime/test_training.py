"""Whole trainings, with real processes."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import safetensors.numpy

from fedota.client import ClientError
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError
from fedota.events.problems import Plan, Strategy
from tests.integration.runtime.conftest import (
    Participant,
    Weights,
    World,
    assert_same,
    expected_after,
    running,
    until,
)


def model() -> Weights:
    """Tensors of several types, among them a scalar, an empty one and a counter."""
    random = np.random.default_rng(7)
    return {
        "dense.weight": random.normal(size=(40, 30)).astype(np.float32),
        "dense.bias": random.normal(size=30),
        "half": random.normal(size=(5, 2)).astype(np.float16),
        "scale": np.array(0.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "batches": np.array([3, 4], np.int64),
    }


def plan(**changes: Any) -> Plan:
    """Three clients a round, all of them needed."""
    usual: dict[str, Any] = {"rounds": 2, "goal_count": 3, "minimum_fraction": 1.0}
    return Plan(**{**usual, **changes})


def _spoiled(value: float) -> bytes:
    """A model of which one number is of no use."""
    numbers = np.zeros(100_000, np.float32)
    numbers[-1] = value
    return safetensors.numpy.save({"counts": np.zeros(3, np.int64), "fine": np.zeros(9), "spoiled": numbers})


async def test_a_training_comes_to_the_weighted_mean(world: World, tmp_path: Path) -> None:
    """Round after round, over two selectors; every stage is reported in order and explains itself."""
    await world.launch(plan(rounds=3), model())
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    homes = [world.selectors[0], world.selectors[0], world.selectors[1]]
    async with running(
        *(one.run(world.kit(one.organization, home), tmp_path) for one, home in zip(clients, homes, strict=True))
    ):
        await until(lambda: world.platform.final)
    platform = world.platform
    assert platform.stages == [
        f"{number}.1 {stage}"
        for number in (1, 2, 3)
        for stage in ("selection", "configuration", "reporting", "completed")
    ]
    for number in (1, 2, 3):
        completed = platform.completed(number)
        assert completed is not None and completed.checkpoint is not None
        assert_same(platform.weights(completed), expected_after(world.model, number, *clients))
        assert completed.participants == ["org 1", "org 2", "org 3"]
        assert (completed.reported, completed.examples, completed.refusals) == (3, 6, [])
        assert completed.metrics == pytest.approx({"loss": 3 / 6})
        manifest = platform.manifest(completed)
        assert manifest["sha256"] == completed.checkpoint.sha256
        before = platform.completed(number - 1)
        assert manifest["base"]["sha256"] == (
            before.checkpoint.sha256 if before and before.checkpoint else world.digest
        )
    assert all(one.reason for one in platform.reports)
    assert all(one.said("round 3: your update counts") and one.said("The training is finished.") for one in clients)


async def test_clients_that_come_late_are_told_that_it_is_over(world: World, tmp_path: Path) -> None:
    """By a coordinator that was started again, too."""
    await world.launch(plan(rounds=1, goal_count=1), model())
    first, late = Participant(1, free=True), Participant(2, free=True)
    await first.run(world.kit("org 1"), tmp_path)
    await world.coordinator.kill()
    await asyncio.gather(*(selector.kill() for selector in world.selectors))
    await world.coordinator.start()
    await asyncio.gather(*(selector.start() for selector in world.selectors))
    reports = len(world.platform.reports)
    await late.run(world.kit("org 2"), tmp_path)
    assert late.said("The training is finished.") and not late.rounds
    assert len(world.platform.reports) == reports


async def test_a_client_that_never_reports_ends_the_attempt(world: World, tmp_path: Path) -> None:
    """At the report timeout; after the plan's attempts the training ends, and all say why."""
    await world.launch(plan(goal_count=2, report_timeout=3.0, attempts=2), model())
    good, stuck, later = Participant(1, free=True), Participant(2), Participant(3)
    async with running(good.run(world.kit("org 1"), tmp_path), stuck.run(world.kit("org 2"), tmp_path)):
        await until(lambda: "1.1 abandoned" in world.platform.stages)
        async with running(later.run(world.kit("org 3"), tmp_path)):
            final = await until(lambda: world.platform.final)
            stuck.go()
            later.go()
    assert (final.stage, final.attempt, final.reported) == ("abandoned", 2, 1)
    assert final.reason == (
        "abandoned: 1 of 2 reported within 3 seconds, at least 2 were needed; "
        "that was the last of 2 attempts, the training ends here"
    )
    first = next(one for one in world.platform.reports if one.stage == "abandoned")
    assert (first.attempt, first.final) == (1, False)
    ended = "The training ended in round 1: 1 of 2 reported within 3 seconds, at least 2 were needed."
    assert good.said(ended) and stuck.said(ended)
    assert good.said("ended without you")


async def test_the_minimum_count_completes_a_round_at_the_timeout(world: World, tmp_path: Path) -> None:
    """Without the client that did not report; its update comes too late."""
    await world.launch(plan(rounds=1, goal_count=3, minimum_fraction=0.6, report_timeout=3.0), model())
    good, slow = [Participant(1, free=True), Participant(2, free=True)], Participant(3)
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in (*good, slow))):
        final = await until(lambda: world.platform.final)
        slow.go()
    assert final.reported == 2
    assert final.reason.startswith("2 of 3 clients reported in ") and "at least 2 were needed" in final.reason
    assert_same(world.platform.weights(final), expected_after(world.model, 1, *good))
    assert slow.said("too late")


async def test_nobody_comes(world: World) -> None:
    """The selection times out, attempt by attempt, and says whom it missed."""
    await world.launch(plan(selection_timeout=0.5, attempts=3), model())
    final = await until(lambda: world.platform.final)
    assert world.platform.stages == [
        f"1.{attempt} {stage}" for attempt in (1, 2, 3) for stage in ("selection", "abandoned")
    ]
    assert "0 of 3 clients came within 0.5 seconds, at least 3 were needed" in final.reason


async def test_training_goes_on_without_anybody_to_report_to(world: World, tmp_path: Path) -> None:
    """All that happened is told in order afterwards."""
    await world.launch(plan(rounds=3), model())
    await until(lambda: world.platform.reports)
    world.platform.refusing = FedotaError("unavailable", "The log is away.")
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: len(world.store.puts) == 6)  # three checkpoints, each with its manifest
        assert world.platform.completed(1) is None
        assert not any(one.said("The training is finished.") for one in clients), "a crash would need them again"
        world.platform.refusing = None
        final = await until(lambda: world.platform.final)
    assert [one.report for one in world.platform.reports] == list(range(1, len(world.platform.reports) + 1))
    assert_same(world.platform.weights(final), expected_after(world.model, 3, *clients))


async def test_a_refused_report_stops_the_training(world: World, tmp_path: Path) -> None:
    """The coordinator is not ready any more, says why, and tries no second time."""
    await world.launch(plan(goal_count=1), model())
    one = Participant(1)
    task = asyncio.create_task(one.run(world.kit("org 1"), tmp_path))
    try:
        await until(lambda: one.rounds)
        world.platform.refusing = FedotaError("report_refused", "Run 1 is over.")
        one.go()
        async with aiohttp.ClientSession() as http:
            async with asyncio.timeout(10):
                while True:
                    async with http.get(f"{world.coordinator.url}/readyz") as reply:
                        body = await reply.json()
                        if reply.status == 503:
                            break
                    await asyncio.sleep(0.02)
        assert body["failing"] == {"training": "report_refused: Run 1 is over."}
        await until(lambda: "a report was refused" in world.coordinator.log())  # it asks first whether that is the end
        assert "Run 1 is over." in world.coordinator.log()
        assert await world.coordinator.stop() == 0
        assert not task.done(), "the client waits for a coordinator that goes on"
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_round_is_completed_only_when_its_checkpoint_is_stored(world: World, tmp_path: Path) -> None:
    """While the store is down that is what the round says; then it goes on."""
    await world.launch(plan(rounds=1, goal_count=1), model())
    world.store.failing = True
    one = Participant(1, free=True)
    async with running(one.run(world.kit("org 1"), tmp_path)):
        await until(lambda: "503 (SlowDown)" in world.platform.reports[-1].reason)
        assert world.platform.reports[-1].stage == "reporting"
        world.store.failing = False
        await until(lambda: world.platform.final)


@pytest.mark.parametrize(
    ("changes", "body", "said"),
    [
        ({"strategy": Strategy(name="magic")}, None, "there is no strategy 'magic'"),
        ({"strategy": Strategy(parameters={"momentum": 0.9})}, None, "fedavg takes no parameters"),
        ({}, b"not a model", "cannot be trained: The body is not in safetensors form"),
        ({}, safetensors.numpy.save({"w": np.zeros(2, bool)}), "'w' has the dtype BOOL, which cannot be aggregated"),
        ({}, _spoiled(np.nan), "its tensor 'spoiled' has values that are not finite"),
        ({}, _spoiled(-np.inf), "its tensor 'spoiled' has values that are not finite"),
    ],
)
async def test_a_coordinator_that_cannot_train_says_why_and_ends(
    world: World, changes: dict[str, Any], body: bytes | None, said: str
) -> None:
    """Whoever started it finds a plain sentence in its log."""
    world.prepare(plan(**changes), model(), body=body)
    await world.coordinator.start(wait=False)
    assert await asyncio.wait_for(world.coordinator.process.wait(), 20) == 1
    log = world.coordinator.log()
    assert said in log and said in log.splitlines()[-1]


async def _asked(world: World, key: str = "a shared secret") -> tuple[int, dict[str, Any]]:
    """What a selector is answered that asks for its orders."""
    url = f"{world.coordinator.url}/v1/selectors/selector-0/orders?life=a"
    async with aiohttp.ClientSession() as http, http.get(url, headers={"Authorization": f"Bearer {key}"}) as reply:
        return reply.status, await reply.json()


async def test_a_coordinator_says_how_far_it_is_until_it_can_begin(world: World) -> None:
    """However long its model takes: who looks after it sees that it gets on, and selectors are told to come again."""
    world.prepare(plan(), {"w": np.zeros(1_000_000, np.float32)})
    world.store.held = (1_250_000, others := asyncio.Event())
    await world.coordinator.start(wait=False)
    await world.coordinator.listens()
    assert await world.coordinator.says("1.2 of 4.0 MB") == "the model: 1.2 of 4.0 MB fetched"
    status, problem = await _asked(world)
    assert (status, problem["code"]) == (503, "unavailable")
    assert problem["detail"] == "The coordinator has not begun yet: the model: 1.2 of 4.0 MB fetched. Ask again."
    assert (await _asked(world, "a guess"))[0] == 401
    others.set()
    await world.coordinator.answers()
    assert (await _asked(world))[0] == 200


async def test_a_coordinator_that_waits_for_its_model_can_be_stopped(world: World) -> None:
    """As soon as it is asked to."""
    world.prepare(plan(), {"w": np.zeros(1_000_000, np.float32)})
    world.store.held = (1_250_000, asyncio.Event())
    await world.coordinator.start(wait=False)
    await world.coordinator.listens()
    await world.coordinator.says("fetched")
    world.coordinator.process.terminate()
    assert await asyncio.wait_for(world.coordinator.process.wait(), 3) == 0


async def test_a_model_that_is_not_the_recorded_one_is_not_trained(world: World) -> None:
    """Its digest is checked before anything is done with it."""
    world.prepare(plan(), model())
    key = next(iter(world.store.objects))
    world.store.objects[key] = world.store.objects[key][:-1] + b"!"
    await world.coordinator.start(wait=False)
    assert await asyncio.wait_for(world.coordinator.process.wait(), 20) == 1
    assert "is not the object that was recorded" in world.coordinator.log()


async def test_processes_end_with_their_launcher(world: World) -> None:
    """At the end of standard input, and gracefully when asked."""
    await world.launch(plan(), model())
    assert world.coordinator.process.stdin is not None
    world.coordinator.process.stdin.close()
    assert await asyncio.wait_for(world.coordinator.process.wait(), 10) == 0
    assert await world.selectors[0].stop() == 0
    assert '"stopping"' in world.coordinator.log()


async def test_a_kit_that_is_not_good_ends_the_client(world: World, tmp_path: Path) -> None:
    """With a sentence that says what to do."""
    await world.launch(plan(), model())
    kit = world.kit("org 1")

    def changed(**changes: Any) -> Kit:
        return Kit(**{name: changes.get(name, getattr(kit, name)) for name in kit.__struct_fields__})

    cases = {
        "has expired. Fetch a new join kit": changed(token=world.token("org 1", seconds=-1)),
        "for another problem": changed(token=world.token("org 1", problem_id="another")),
        "not signed by this platform": changed(token=kit.token[:-4] + "AAAA"),
        "The join kit has expired": changed(expires=1),
        "names no selector": changed(selectors=[]),
    }
    for said, bad in cases.items():
        with pytest.raises(ClientError, match=said):
            await Participant(1).run(bad, tmp_path)


async def test_a_client_gives_up_when_nobody_answers(world: World, tmp_path: Path) -> None:
    """After its patience, naming whom it asked."""
    kit = Kit(problem_id="p", name="P", organization="o", token="t", selectors=["http://127.0.0.1:9"], expires=2**31)
    with pytest.raises(ClientError, match=r"No selector answered for \d+ seconds \(tried: http://127.0.0.1:9;"):
        await Participant(1).run(kit, tmp_path, patience=0.5)
