"""A coordinator's training, with a platform that answers when the test says so."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from aiohttp import web

from fedota.contracts.runtime import (
    CoordinatorSettings,
    Presigned,
    PresignRequest,
    Report,
    Reported,
    Resume,
    RevokedOrganizations,
)
from fedota.errors import FedotaError
from fedota.events.problems import ModelFile, Plan
from fedota.process import serving
from fedota.runtime.coordinator import rounds
from fedota.runtime.coordinator import training as module
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.coordinator.objects import Objects
from fedota.runtime.coordinator.platform import Platform
from fedota.runtime.coordinator.state import Cohort, Member, Rules, Spoiled, Tick
from fedota.runtime.coordinator.storing import DamagedError
from fedota.runtime.coordinator.training import Training
from fedota.runtime.places import whole
from fedota.runtime.protocol import Accepted, Claim, Concluded, Held, Meta, Told
from fedota.runtime.sending import send_file
from fedota.runtime.tensors import layout_of

MODEL = safetensors.numpy.save({"w": np.arange(10_000, dtype=np.float32)})
DIGEST = hashlib.sha256(MODEL).hexdigest()
PLAN = Plan(rounds=1, goal_count=1)


class Ground:
    """The platform and its object store: a run that has not begun, of `MODEL`."""

    def __init__(self, directory: Path) -> None:
        self.url = ""
        self.ranges: list[str] = []
        self.asked: asyncio.Queue[asyncio.Future[RevokedOrganizations]] = asyncio.Queue()  # who was revoked
        self.refusal: FedotaError | None = None
        self.resumed = asyncio.Event()  # that is asked again
        self.resuming: asyncio.Future[Resume] | None = None  # the answer then
        self._stored = directory / "stored"
        self._stored.write_bytes(MODEL)

    async def resume(self, run: int) -> Resume:
        """Nothing was recorded, when it is asked first."""
        assert run == 1
        if self.resuming is None:
            return Resume()
        self.resumed.set()
        return await self.resuming

    async def presign(self, request: PresignRequest) -> Presigned:
        """An address here."""
        return Presigned(url=f"{self.url}/{request.key}", headers={})

    async def get(self, request: web.Request) -> web.StreamResponse:
        """The model."""
        self.ranges.append(request.headers.get("Range", ""))
        return await send_file(request, self._stored)

    async def report(self, report: Report) -> Reported:
        """Record it. By now an organization was revoked."""
        if self.refusal:
            raise self.refusal
        return Reported(position=report.update.report, revoked=["org"])

    async def revoked(self, run: int) -> RevokedOrganizations:
        """As the test says."""
        assert run == 1
        answer = asyncio.get_running_loop().create_future()
        self.asked.put_nowait(answer)
        return cast("RevokedOrganizations", await answer)


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    """One that answers."""
    made = Ground(tmp_path)
    app = web.Application()
    app.router.add_get("/{key}", made.get)
    async with serving(app, "127.0.0.1", 0) as made.url:
        yield made


async def loaded(ground: Ground, directory: Path, plan: Plan = PLAN) -> Training:
    """A training that has its model."""
    settings = CoordinatorSettings(
        problem_id="p",
        run=1,
        plan=plan,
        model=ModelFile(key="model", sha256=DIGEST, size=len(MODEL)),
        nats_url="",
        nats_credentials="",
        key="",
    )
    training = Training(settings, Rules(problem_id="p", run=1, plan=plan, life="c1"), directory)
    platform = cast("Platform", ground)
    async with aiohttp.ClientSession() as http:
        await training.load(platform, Objects(platform, http))
    return training


async def test_a_model_s_download_goes_on_in_the_next_life(ground: Ground, tmp_path: Path) -> None:
    """Else a coordinator whose model takes longer than it may take to begin would never begin. Other drafts go."""
    models = tmp_path / "models"
    models.mkdir()
    (models / f"{DIGEST}.new").write_bytes(MODEL[:30_000])
    (models / f"{'0' * 64}.new").write_bytes(b"of another model")
    training = await loaded(ground, tmp_path)
    assert ground.ranges == ["bytes=30000-"]
    assert training.model_file(DIGEST).read_bytes() == MODEL
    assert list(models.iterdir()) == [training.model_file(DIGEST)]


async def test_a_model_that_was_damaged_meanwhile_is_fetched_anew(ground: Ground, tmp_path: Path) -> None:
    """An earlier life had it whole, or a part of it: what a disk has made of that since is not trained on."""
    models = tmp_path / "models"
    models.mkdir()
    (models / f"{DIGEST}.safetensors").write_bytes(bytes(len(MODEL)))
    (models / f"{DIGEST}.new").write_bytes(bytes(30_000))
    training = await loaded(ground, tmp_path)
    assert ground.ranges == ["bytes=30000-", ""]
    assert training.model_file(DIGEST).read_bytes() == MODEL


async def test_no_sum_is_taken_of_whoever_gave_out_a_ticket_that_is_granted_to_another(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent when the coordinator began, and comes back with the update that was asked for elsewhere."""
    training = await loaded(ground, tmp_path, Plan(rounds=1, goal_count=3, selectors=2))
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    work = {"cohort": "k", "round": 1, "attempt": 1, "base": DIGEST, "share": 2, "shares": {"a": 2, "b": 2}}

    def tells(life: str, after: float = 0.0, **held: Any) -> None:
        now[0] += after
        part = Held(**{**work, "deadline": now[0] + 600, "selected": 2, **held})
        training.happened(Told(name=life, life=life, waiting=0, held=part))

    for _ in range(3):
        tells("b", 6.0, reported=1)
    wanted = Claim(life="b", cohort="k", ticket="t", name="a", issuer="a")
    assert training.claim(wanted).answer == "granted"
    tells("a", reported=2)
    assert training.orders("a", "a").lost and training.state.phase == "reporting"
    tells("b", reported=3, claimed={"t": "a"})
    collect = training.orders("b", "b").work
    assert collect is not None and collect.collect
    training.require_wanted(Meta(cohort="k", life="b", collection=collect.collect, accepted=[]))
    with pytest.raises(FedotaError, match="round_over"):
        training.require_wanted(Meta(cohort="k", life="a", collection=collect.collect, accepted=[]))


async def test_an_older_answer_does_not_let_the_revoked_in_again(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report was answered, naming an organization, while it was asked who is revoked."""
    monkeypatch.setattr(module, "_ATTENTION", 0.0)
    training = await loaded(ground, tmp_path)
    attending = asyncio.create_task(training.attend())
    older = await ground.asked.get()
    reporting = asyncio.create_task(training.report())
    while not training.reporter.number:
        await training.changed.wait()
    older.set_result(RevokedOrganizations(revoked=[]))
    newer = await ground.asked.get()
    assert training.state.revoked == ["org"]
    newer.set_result(RevokedOrganizations(revoked=[]))
    await ground.asked.get()
    assert training.state.revoked == []
    for task in (attending, reporting):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("error", [OSError, MemoryError])
async def test_half_a_sum_in_the_total_ends_the_coordinator(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Whatever broke it off; the next life collects the sums anew."""

    def fail(*_: Any) -> None:
        raise error

    training = await loaded(ground, tmp_path)
    collector = Collector(layout_of(memoryview(MODEL)), tmp_path)
    monkeypatch.setattr(Training, "collector", collector)
    monkeypatch.setattr(training, "require_wanted", lambda _: collector)
    monkeypatch.setattr(collector, "_merge", fail)
    with pytest.raises(error):
        await training.take(Meta(cohort="c", life="a", collection="collection", accepted=[]), collector.place())
    with pytest.raises(RuntimeError, match="as a whole"):
        await asyncio.wait_for(training.conclude(), 5)


async def test_half_a_sum_in_a_total_that_was_given_up_harms_nobody(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its collection ended while the sum was added: nothing will come of that total."""
    training = await loaded(ground, tmp_path)
    collector = Collector(layout_of(memoryview(MODEL)), tmp_path)
    monkeypatch.setattr(training, "_collector", ("collection", collector))
    collector.damaged = True
    training._due.set()
    concluding = asyncio.create_task(training.conclude())
    while training._due.is_set():  # noqa: ASYNC110 - in the step that clears it, it looks
        await asyncio.sleep(0)
    assert not concluding.done()
    concluding.cancel()
    with suppress(asyncio.CancelledError):
        await concluding


def an_attempt_ends(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """No selector came, and then no client; this is reported, so the journal would have it."""
    for _ in range(2):
        later = rounds.wakes(training.state) + 1
        with monkeypatch.context() as then:
            then.setattr(time, "time", lambda: later)  # noqa: B023 - it is called at once
            training.happened(Tick())


async def test_the_journal_of_a_refused_report_does_not_come_back(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the log is asked whether it went on without this coordinator: the next one would believe the journal."""
    training = await loaded(ground, tmp_path)
    an_attempt_ends(training, monkeypatch)
    assert (tmp_path / "journal.json").exists()
    ground.refusal = FedotaError("report_refused", "It does not follow.")
    ground.resuming = asyncio.get_running_loop().create_future()
    reporting = asyncio.create_task(training.report())
    await ground.resumed.wait()
    assert not (tmp_path / "journal.json").exists()
    an_attempt_ends(training, monkeypatch)
    ground.resuming.set_result(Resume(report=7, attempt=3))
    with pytest.raises(FedotaError, match="It does not follow"):
        await asyncio.wait_for(reporting, 5)
    assert not (tmp_path / "journal.json").exists()


async def test_the_journal_of_a_damaged_checkpoint_does_not_come_back(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the process has ended."""

    async def fail() -> None:
        raise DamagedError

    training = await loaded(ground, tmp_path)
    monkeypatch.setattr(training._storing, "run", fail)
    an_attempt_ends(training, monkeypatch)
    with pytest.raises(DamagedError):
        await training.store()
    an_attempt_ends(training, monkeypatch)
    training._keep_reports([])  # as the reporter does, which goes on until then
    assert not (tmp_path / "journal.json").exists()


async def finished(training: Training) -> None:
    """Its selectors are told that it is over."""
    async with asyncio.timeout(5):
        while training.orders("s", "a").finished is None:
            await training.changed.wait()


async def test_a_stop_is_told_and_nothing_more_is_reported(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To each selector, with the reason, whatever it was doing; the coordinator stays ready."""
    monkeypatch.setattr(module, "_ATTENTION", 0.0)
    training = await loaded(ground, tmp_path)
    cohort = Cohort(id="c", deadline=time.time() + 1000, members={"a": Member(name="s", share=1)})
    training.state = msgspec.structs.replace(training.state, phase="reporting", cohort=cohort)
    assert training.orders("s", "a").work is not None
    attending = asyncio.create_task(training.attend())
    (await ground.asked.get()).set_result(RevokedOrganizations(revoked=["org"], stopped="Enough."))
    (await ground.asked.get()).set_result(RevokedOrganizations(revoked=[], stopped="Enough."))
    await ground.asked.get()
    orders = training.orders("s", "a")
    assert (orders.finished, orders.work, orders.settling) == ("The training was stopped: Enough.", None, False)
    assert orders.last == Concluded(cohort="c", counted=False)
    assert training.claim(Claim(life="b", cohort="c", ticket="t", name="s", issuer="a")).answer == "left_out"
    with pytest.raises(FedotaError, match="round_over"):
        training.require_wanted(Meta(cohort="c", life="a", collection="", accepted=[]))
    reporting = asyncio.create_task(training.report())
    for _ in range(20):
        await asyncio.sleep(0)
    assert training.reporter.number == 0 and training.reporter.waiting, "a report was sent that would be refused"
    await training.check()
    for task in (attending, reporting):
        assert not task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("restored", [0, 3])
async def test_a_report_that_comes_after_a_stop_is_no_fault(ground: Ground, tmp_path: Path, restored: int) -> None:
    """Its refusal may be the first that is heard of the stop: nothing dies of that, and nothing is broken."""
    training = await loaded(ground, tmp_path)
    training._restored = restored
    ground.refusal = FedotaError("report_refused", "Run 1 is over (Enough.).")
    ground.resuming = asyncio.get_running_loop().create_future()
    ground.resuming.set_result(Resume(report=3, finished=True, stopped="Enough."))
    reporting = asyncio.create_task(training.report())
    await finished(training)
    assert training.orders("s", "a").finished == "The training was stopped: Enough."
    assert not reporting.done()
    await training.check()
    reporting.cancel()
    with suppress(asyncio.CancelledError):
        await reporting


async def test_a_report_on_its_way_when_the_stop_is_heard_is_no_fault(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused then."""
    training = await loaded(ground, tmp_path)

    async def refuse(_: Report) -> Reported:
        training._stop("Enough.")
        raise FedotaError("report_refused", "Run 1 is over (Enough.).")

    monkeypatch.setattr(ground, "report", refuse)
    reporting = asyncio.create_task(training.report())
    await finished(training)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reporting.done()
    await training.check()
    reporting.cancel()
    with suppress(asyncio.CancelledError):
        await reporting


async def test_a_run_that_came_to_its_own_end_was_not_stopped(ground: Ground, tmp_path: Path) -> None:
    """The problem is stopped for that very reason, and the coordinator has its own words for it."""
    training = await loaded(ground, tmp_path)
    training.state = msgspec.structs.replace(training.state, phase="finished", finished="The training ended.")
    training._recorded = True
    training._stop("abandoned: too few; the training ends here")
    assert training.orders("s", "a").finished == "The training ended."


async def aggregating(training: Training) -> Collector:
    """The one sum of a cohort was handed over."""
    cohort = Cohort(id="c", deadline=time.time() + 1000, members={"a": Member(name="s", handed=True)}, collections=1)
    training.state = msgspec.structs.replace(training.state, phase="collecting", until=cohort.deadline, cohort=cohort)
    collector = training.collector
    assert collector is not None
    accepted = [Accepted(ticket="t", organization="org", examples=1, metrics={})]
    sum_ = whole(memoryview(bytearray(collector.size)))
    await collector.take(Meta(cohort="c", life="a", collection="", accepted=accepted), sum_)
    training.state = msgspec.structs.replace(training.state, phase="aggregating")
    return collector


def require_left_out(training: Training) -> None:
    """The update is not part of anything, and its client is told so."""
    assert training.orders("s", "a").finished == "The training was stopped: Enough."
    assert training.claim(Claim(life="b", cohort="c", ticket="t", name="s", issuer="a")).answer == "left_out"
    assert training.unrecorded() == 0


async def test_a_stop_while_the_next_weights_are_computed(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are nobody's any more: the updates do not count, and the coordinator does not end."""
    training = await loaded(ground, tmp_path)
    await aggregating(training)
    compute, loop = training._compute, asyncio.get_running_loop()

    def stopped_meanwhile(*args: Any) -> Any:
        loop.call_soon_threadsafe(training._stop, "Enough.")
        return compute(*args)

    monkeypatch.setattr(training, "_compute", stopped_meanwhile)
    await training._conclude()
    require_left_out(training)


async def test_a_stop_while_the_last_sum_is_added(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be added is not dropped under the hands of who takes the total, who would find none and end."""

    async def later() -> None:
        """As sums that wait in files for the one that has the memory."""

    training = await loaded(ground, tmp_path)
    with monkeypatch.context() as then:
        then.setattr(Collector, "_add", lambda _: later())
        collector = await aggregating(training)
    async with collector._alone():
        concluding = asyncio.create_task(training._conclude())
        await asyncio.sleep(0)
        training._stop("Enough.")
    await asyncio.wait_for(concluding, 5)
    require_left_out(training)


async def test_of_sums_that_nobody_waits_for_nothing_is_kept(ground: Ground, tmp_path: Path) -> None:
    """Not of a life that was lost, nor of any when the cohort is opened again or given up."""
    training = await loaded(ground, tmp_path)
    members = {life: Member(name=life) for life in "ab"}
    later = time.time() + 1000
    cohort = Cohort(id="c", deadline=later, members=members, collections=1)
    training.state = msgspec.structs.replace(training.state, phase="collecting", until=later, cohort=cohort)
    collector = training.collector
    assert collector is not None
    for life in "ab":
        collector.parts.keep(life, whole(memoryview(b"some of it")))
    training.happened(Spoiled(life="a", cohort="c"))
    assert training.collector is collector
    assert (collector.parts.received("a"), collector.parts.received("b")) == (0, 10)
    training.happened(Spoiled(life="b", cohort="c"))
    assert collector.parts.received("b") == 0
    with pytest.raises(FedotaError, match="round_over"):
        await collector.take(Meta(cohort="c", life="b", collection="", accepted=[]), collector.place())
