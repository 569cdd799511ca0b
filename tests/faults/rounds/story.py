"""The story of a run, as events, checkpoints, manifests and clients tell it: they must agree on every update."""

import hashlib
import re
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec
import numpy as np
import safetensors.numpy

from fedota.events.rounds import Checkpoint, RoundUpdated
from tests.faults.rounds.processes import Served
from tests.faults.rounds.training import Training
from tests.faults.rounds.updates import Made, Maker, Weights, found_in, mean
from tests.support.waiting import until

_COUNTED: Final = re.compile(r"round (\d+): your update counts")
_BAD_LINES: Final = re.compile(r'"level": ?"critical"|Traceback|never retrieved|never awaited|X-Amz-Signature')


_AT_REST: Final = ("fedota_uploads", "fedota_clients_waiting", "fedota_reports_waiting")
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class Found(NamedTuple):
    """How much was compared; a test that compared nothing has shown nothing."""

    rounds: int
    updates: int
    told: int  # updates of which a client was told that they count
    attempts: int


async def check(training: Training) -> Found:
    """Raise `AssertionError` unless all accounts of a run that is over agree."""
    completed, reports = training.recorder.completed, training.recorder.reports
    assert [one.round for one in completed] == list(range(1, training.plan.rounds + 1))
    assert [one.report for one in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].final and not any(one.final for one in reports[:-1])
    assert training.recorder.faults == [], training.recorder.faults
    _check_attempts(reports)
    made = _made(training)
    model, before, counted = training.model, "", set[Made]()
    for report in completed:
        model, before, updates = await _check_round(training, report, model, before, made)
        assert not counted & updates, "an update is in two rounds"
        counted |= updates
    told = _check_told(training, counted)
    assert told, "no client was ever told that its update counts"
    _check_processes(training)
    for process in (training.coordinator, *training.selectors):
        await _check_at_rest(process)
    attempts = sum(one.stage in ("completed", "abandoned") for one in reports)
    return Found(len(completed), len(counted), told, attempts)


def _check_attempts(reports: list[RoundUpdated]) -> None:
    """Attempts follow on each other, each explains itself, and one that is abandoned says why in numbers."""
    at = (1, 1)
    for one in reports:
        assert (one.round, one.attempt) == at, f"report {one.report}"
        assert one.reason, f"report {one.report} explains nothing"
        assert "X-Amz" not in one.reason, f"report {one.report} tells a presigned URL: {one.reason}"
        if one.stage == "abandoned":
            assert re.search(r"\d", one.reason) and one.checkpoint is None, one.reason
            at = (one.round, one.attempt + 1)
        elif one.stage == "completed":
            at = (one.round + 1, 1)


def _made(training: Training) -> dict[tuple[int, int], Made]:
    """Each training that there ever was, by the client's slot and the number of the call."""
    return {
        (maker.slot, line["call"]): Made(maker, line["trained"], line["call"])
        for maker in training.makers.values()
        for line in training.written(maker)
        if "trained" in line
    }


async def _check_round(
    training: Training, report: RoundUpdated, base: Weights, before: str, made: dict[tuple[int, int], Made]
) -> tuple[Weights, str, set[Made]]:
    """A checkpoint holds the updates that its report and its manifest tell of, and nothing else.

    `base` is what an undisturbed run would begin the round with; what it would come to is returned.
    """
    checkpoint = report.checkpoint
    assert checkpoint is not None
    weights = await _weights(training, checkpoint)
    found = found_in(weights, report.examples, training.makers)
    updates = [made[maker.slot, call] for maker, call in found]
    assert {one.round for one in updates} == {report.round}, "an update of another round is in the checkpoint"
    expected = mean(base, updates)
    for name, values in expected.items():
        assert weights[name].dtype == values.dtype
        if name == "chain":
            np.testing.assert_allclose(weights[name], values, rtol=1e-9, atol=1e-12, err_msg=name)
        else:
            np.testing.assert_array_equal(weights[name], values, err_msg=f"round {report.round}: {name}")
    assert report.reported == len(updates) >= training.plan.minimum_count
    organizations = sorted({f"org {maker.number}" for maker, _ in found})
    assert report.participants == organizations
    _check_contributions(report, found)
    manifest = await _manifest(training, checkpoint)
    told = {"round": report.round, "attempt": report.attempt, "sha256": checkpoint.sha256, "size": checkpoint.size}
    told |= {"updates": len(updates), "examples": report.examples, "participants": organizations}
    assert {name: manifest[name] for name in told} == told
    assert manifest["base"]["sha256"] == (before or training.model_sha256)
    return expected, checkpoint.sha256, set(updates)


def _check_contributions(report: RoundUpdated, found: list[tuple[Maker, int]]) -> None:
    """What each organization is said to have given is what is in the checkpoint of it."""
    told = {one.organization: (one.updates, one.examples) for one in report.contributions if one.updates}
    there: dict[str, tuple[int, int]] = {}
    for maker, _ in found:
        updates, examples = there.get(f"org {maker.number}", (0, 0))
        there[f"org {maker.number}"] = (updates + 1, examples + maker.examples)
    assert told == there, f"round {report.round}"


async def _weights(training: Training, checkpoint: Checkpoint) -> Weights:
    seen = await training.blobs.read(checkpoint.key, keep=checkpoint.size)
    assert seen is not None, f"{checkpoint.key} was reported, and is not there"
    body = seen.head
    assert (len(body), hashlib.sha256(body).hexdigest()) == (checkpoint.size, checkpoint.sha256)
    weights: Weights = safetensors.numpy.load(body)
    return weights


async def _manifest(training: Training, checkpoint: Checkpoint) -> dict[str, Any]:
    key = checkpoint.key.removesuffix(".safetensors") + ".json"
    seen = await training.blobs.read(key, keep=1 << 22)
    assert seen is not None, f"{key} is not there"
    manifest: dict[str, Any] = msgspec.json.decode(seen.head)
    return manifest


def _check_told(training: Training, counted: set[Made]) -> int:
    """Of whichever update a client was told that it counts, it does. How many these are."""
    told = 0
    for maker in training.makers.values():
        last: dict[int, Made] = {}
        for line in training.written(maker):
            if "trained" in line:
                last[line["trained"]] = Made(maker, line["trained"], line["call"])
            elif found := _COUNTED.match(line.get("said", "")):
                number = int(found[1])
                assert last[number] in counted, f"{maker} was told that its update of round {number} counts"
                told += 1
    return told


def _check_processes(training: Training) -> None:
    """No process ended by itself, and none wrote down an error that nobody expected."""
    for process in training.processes:
        assert process.surprises == []
        log = process.log()
        bad = _BAD_LINES.search(log)
        assert bad is None, f"{process.name} wrote:\n{log[max(0, bad.start() - 500) : bad.start() + 4000]}"


async def _check_at_rest(process: Served) -> None:
    """Nobody waits, nothing is on its way in or out any more, and the process is ready."""
    seen: dict[str, float] = {}

    async def rests() -> bool:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as http:
            async with http.get(f"{process.url}/metrics") as reply:
                lines = (await reply.text()).splitlines()
            async with http.get(f"{process.url}/readyz") as reply:
                ready = reply.status == 200
        numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        seen.update({name: float(value) for name, value in numbers.items() if name in _AT_REST})
        return ready and bool(seen) and not any(seen.values())

    await until(rests, f"{process.name} is at rest, not {seen}")
