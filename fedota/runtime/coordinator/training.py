"""One run of a problem: the state machine with its clock, its reports, and the work that its stages ask for."""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from fedota.contracts.runtime import CoordinatorSettings, Report, Resume
from fedota.errors import FedotaError
from fedota.events.problems import ModelFile
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.aggregation import WeightedSum, aggregate, choose_strategy
from fedota.runtime.contributions import of_updates
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.coordinator.fates import Fates
from fedota.runtime.coordinator.inspection import digest, not_finite
from fedota.runtime.coordinator.journal import Entry, Journal, begin, last_checkpoint, still_true
from fedota.runtime.coordinator.lineage import manifest
from fedota.runtime.coordinator.objects import Objects, StoreError
from fedota.runtime.coordinator.platform import Platform, insist
from fedota.runtime.coordinator.reporter import REFUSED, Reporter
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Ended,
    Event,
    Handed,
    Recorded,
    Result,
    Revoked,
    Rules,
    Spoiled,
    Stopped,
    Tick,
)
from fedota.runtime.coordinator.storing import DamagedError, Storing
from fedota.runtime.places import Memory, Spooled, opened
from fedota.runtime.protocol import Claim, Claimed, Meta, ModelRef, Orders
from fedota.runtime.rooms import Rooms
from fedota.runtime.tensors import read_layout

_BEAT: Final = 1.0  # seconds
_SUMS: Final = 2  # in memory, mostly: the total and what is added to it
_AHEAD: Final = 64  # pieces of a checkpoint that wait to be hashed
_ATTENTION: Final = 2.0  # seconds between two questions who was revoked, and whether the run was stopped
_STOOD_STILL: Final = 3.0  # seconds: a beat that is so late means that the process did not run
_log = structlog.get_logger(__name__)


class StartError(Exception):
    """The coordinator cannot begin; the message says why and what to do."""


class Training:
    """Runs rounds. Whoever changes anything calls `happened`; `changed` is set after each change.

    What it can be asked and told before it is `load`ed: `says`, `check`, `require_begun` and `close`.
    """

    def __init__(self, settings: CoordinatorSettings, rules: Rules, directory: Path) -> None:
        plan = settings.plan
        try:
            self._strategy = choose_strategy(plan.strategy.name, plan.strategy.parameters)
        except ValueError as error:
            raise StartError(f"The plan's strategy cannot be used: {error}. Correct the plan.") from None
        self._settings = settings
        self._rules = rules
        self._models = directory / "models"
        self._journal = Journal(directory / "journal.json", settings.run)
        self._storing = Storing(
            directory / "checkpoints", self.model_file, lambda *one: self._objects.store(*one), self._storing_moved
        )
        self._ended: Ended | None = None  # as the journal is to say it
        self._restored = 0  # the number of the last report that an earlier life had left in the journal
        self._moved = asyncio.Event()
        self._due = asyncio.Event()
        self._collector: tuple[str, Collector] | None = None
        self._fates = Fates()
        self._rooms = Rooms(_SUMS)
        self.halted: Exception | None = None
        self.closing = False
        self._recorded = False  # the run's last report
        self._stopped = False  # from outside, before that
        self._beat = time.monotonic()
        self._begun = asyncio.Event()
        self._doing = "it connects to NATS"  # until it has begun

    def says(self, doing: str) -> None:
        """What it does before it begins, or why it cannot, in words."""
        self._doing = doing

    def require_begun(self) -> None:
        """Raise `unavailable` before it has begun."""
        if not self._begun.is_set():
            said = self._doing.rstrip(".")
            raise FedotaError("unavailable", f"The coordinator has not begun yet: {said}. Ask again.", retry_after=1)

    async def load(self, platform: Platform, objects: Objects) -> None:
        """Find out where the run stands, and have the weights to go on with. Asks until it is answered.

        Raises what no waiting mends: `StartError`, `WrongObjectError`.
        """
        run, retried = self._settings.run, (FedotaError, msgspec.DecodeError)
        self.says("it asks what is recorded of the run")
        resume = await insist(lambda: platform.resume(run), retried=retried, trouble=self.says)
        self._objects = objects
        entry = await self._remembered(resume)
        begun: ModelFile | Checkpoint = resume.checkpoint or self._settings.model
        begins = (last_checkpoint(entry.reports) if entry else None) or begun
        self._recorded_base = begun.sha256
        self._digests = [begins.sha256]
        self._storing.restore([one.checkpoint for one in entry.reports if one.checkpoint] if entry else [])
        await asyncio.to_thread(self._models.mkdir, mode=0o700, exist_ok=True)
        await self._sweep()
        await self._have(begins)
        self._base = ModelRef(sha256=begins.sha256, size=begins.size)
        try:
            self._layout = read_layout(self.model_file(begins.sha256))
        except FedotaError as error:
            raise StartError(f"The model {begins.key} cannot be trained: {error.problem.detail}") from None
        if begins is self._settings.model:  # checkpoints are finite: each update was looked at before it was added
            await self._require_finite()
        self._platform = platform
        self.reporter = Reporter(
            self._send,
            resume.report,
            counts=self._counts,
            held=self._is_held,
            meanwhile=self._meanwhile,
            keep=self._keep_reports,
        )
        self._begin(resume, entry)
        self._begun.set()
        _log.info("training", round=self.state.round, attempt=self.state.attempt, finished=resume.finished)

    async def _remembered(self, resume: Resume) -> Entry | None:
        """What the journal knows that the log does not, if the two agree and all that it speaks of is here."""
        entry = self._journal.read()
        if entry is None:
            return None
        entry = still_true(entry, resume, self._settings.model.sha256)
        if entry is None or not await self._all_here(entry.reports):
            _log.warning("the journal does not fit the log or what is here; the log alone says where to go on")
            self._journal.drop()
            return None
        return entry

    async def _all_here(self, reports: Sequence[RoundUpdated]) -> bool:
        checkpoints = [one.checkpoint for one in reports if one.checkpoint]
        if not all(map(self._storing.has_files, checkpoints)):
            return False
        # The others' digests are looked at before they are stored: so many gigabytes would hold up the beginning.
        return all([await self._is_whole(one) for one in checkpoints[-1:]])

    async def _is_whole(self, object_: ModelFile | Checkpoint) -> bool:
        path = self.model_file(object_.sha256)
        return path.exists() and await digest(path, self.says) == object_.sha256

    async def _have(self, object_: ModelFile | Checkpoint) -> None:
        path = self.model_file(object_.sha256)
        if await self._is_whole(object_):
            return
        self.says("it asks where the model can be fetched")
        await insist(
            lambda: self._objects.fetch(object_.key, object_.sha256, object_.size, path, self.says),
            retried=(StoreError, FedotaError, msgspec.DecodeError),
            trouble=self.says,
        )

    async def _require_finite(self) -> None:
        model = self._settings.model
        if name := await not_finite(self.model_file(model.sha256), self._layout, self.says):
            raise StartError(
                f"The model {model.key} cannot be trained: its tensor {name[:100]!r} has values that are not finite, "
                "or too large to be summed. No update to it would be accepted. Store a model of finite numbers."
            )

    def _begin(self, resume: Resume, entry: Entry | None) -> None:
        self._recorded = resume.finished
        self._beat = time.monotonic()  # however long it took to come here
        self.state, reports = begin(self._rules, resume, entry, self._base, time.time())
        self._ended = self.state.ended
        if entry and entry.reports:
            self._restored = entry.reports[-1].report
            self.reporter.restore(entry.reports)
            _log.info("going on from the journal", reports=len(entry.reports))
        self._tell(reports)
        self.happened(Revoked(organizations=resume.revoked))

    def model_file(self, sha256: str) -> Path:
        """Where the weights with this digest lie while they are in use."""
        return self._models / f"{sha256}.safetensors"

    def has_model(self, sha256: str) -> bool:
        """Whether these weights are in use."""
        return sha256 in self._digests

    def unrecorded(self) -> int:
        """How many rounds count though they are not recorded yet."""
        return len(self.state.unrecorded)

    def close(self) -> None:
        """Nobody waits for anything any more."""
        self.closing = True
        self._wake()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change."""
        return self._moved

    def happened(self, event: Event) -> None:
        """Take an event in, and report and do what follows from it."""
        if time.monotonic() - self._beat > _BEAT + _STOOD_STILL:
            self._beat = time.monotonic()
            self._take_in(Awoken())  # before the first word of one selector makes the others look silent
        self._take_in(event)

    def _take_in(self, event: Event) -> None:
        if self.halted is not None:
            return
        before = self.state
        state, reports = rounds.step(self._rules, before, event, time.time())
        self._ended = state.ended
        if state.ended is not None and state.ended is not before.ended and not state.ended.counted:
            self._fates.ended(state.ended.cohort)
        self._tell(reports)  # and the journal has them, before anybody is told anything that follows from it
        self.state = state
        if self.state != before:
            self._drop_parts()
            self._wake()
            self._due.set()
            self.reporter.counts_changed()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _tell(self, reports: list[RoundUpdated]) -> None:
        for one in reports:
            _log.info("round", round=one.round, attempt=one.attempt, stage=one.stage, reason=one.reason)
        self.reporter.tell(reports)

    def _keep_reports(self, reports: Sequence[RoundUpdated]) -> None:
        if self.halted is not None:
            return
        self._journal.keep(
            Entry(run=self._settings.run, base=self._recorded_base, reports=list(reports), ended=self._ended)
        )

    def _is_held(self, report: RoundUpdated) -> bool:
        """A round is told to be completed only when its checkpoint can be had; of a run that was stopped none is."""
        return self._stopped or (report.checkpoint is not None and report.checkpoint.key in self._storing)

    def _meanwhile(self, report: RoundUpdated) -> RoundUpdated | None:
        if self._stopped or not self._storing.trouble:
            return None
        return words.unstored(report, len(self.state.unrecorded), self._storing.trouble)

    def _storing_moved(self) -> None:
        self.reporter.look_again()

    def _counts(self) -> RoundUpdated | None:
        """The stage that was told last, with its present counts."""
        if self.state.phase in ("configuration", "ahead", "finished"):  # these are told as a whole
            return None
        return words.report(self._rules, self.state, time.time())

    async def keep_time(self) -> None:
        """Let the machine know that time passes."""
        await self._begun.wait()
        while True:
            self._beat = time.monotonic()
            wait = min(_BEAT, max(0.001, rounds.wakes(self.state) - time.time()))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), _BEAT if self.halted else wait)
            self.happened(Tick())

    async def report(self) -> None:
        """Send the reports; when one is refused the training stops, for nothing after it could be recorded."""
        await self._begun.wait()
        try:
            await self.reporter.run()
        except FedotaError as error:
            if not self._stopped:
                await self._refused(error)
            await asyncio.Event().wait()

    async def _refused(self, error: FedotaError) -> None:
        """What a report's refusal means. Raises `error` where whoever begins again can go on: the log is right."""
        self._halt(error)
        resume = await self._asked_again()
        if resume is not None and resume.stopped is not None:
            self._stop(resume.stopped)  # it came too late
        elif self._is_behind(resume):
            raise error
        else:  # it is for a person to see why, and starting again would not change it
            _log.critical("a report was refused: the training stops", error=str(error))

    async def _asked_again(self) -> Resume | None:
        """What is recorded of the run; None when there is nothing to go on from."""
        run, retried = self._settings.run, (FedotaError, msgspec.DecodeError)
        try:
            return await insist(lambda: self._platform.resume(run), retried=retried, fatal=REFUSED)
        except FedotaError:
            return None

    def _is_behind(self, resume: Resume | None) -> bool:
        """Whether the log tells another story than ours: what an earlier life had sent may arrive after all."""
        if self.reporter.number < self._restored:
            return True
        return resume is not None and resume.report != self.reporter.number and not resume.finished

    def _stop(self, reason: str) -> None:
        """The run was ended from outside: clients hear why, nothing more counts, and nothing more is reported.

        Harmless where it had come to its own end: then clients were told so.
        """
        if self._recorded or self._stopped:
            return
        _log.info("stopped", reason=reason)
        self._stopped, self.halted = True, None
        self.happened(Stopped(words=words.stopped(reason)))

    async def _send(self, report: Report) -> None:
        reported = await self._platform.report(report)
        self._recorded = report.update.final
        if (checkpoint := report.update.checkpoint) is not None:
            self._recorded_base = checkpoint.sha256
            self._storing.forget(checkpoint)
            self.happened(Recorded(key=checkpoint.key))
            if self.state.phase != "aggregating":  # then another one may just have been written
                await self._sweep()
        self.happened(Revoked(organizations=reported.revoked))
        self._wake()

    async def attend(self) -> None:
        """Hear who was revoked and of a stop, for ever: in a round in which nothing is reported for long, too."""
        await self._begun.wait()
        while True:
            await asyncio.sleep(_ATTENTION)
            recorded = self.reporter.number
            with suppress(FedotaError, msgspec.DecodeError):  # whoever sends reports says that nobody answers
                answer = await self._platform.revoked(self._settings.run)
                if answer.stopped is not None:
                    self._stop(answer.stopped)
                if self.reporter.number == recorded:  # else a report's answer may be the newer one
                    self.happened(Revoked(organizations=answer.revoked))

    async def store(self) -> None:
        """Store the checkpoints, in order, beside the training."""
        await self._begun.wait()
        try:
            await self._storing.run()
        except DamagedError as error:
            self._halt(error)
            raise

    def _halt(self, error: Exception) -> None:
        """Forget the journal. Nothing happens from now on: whatever did would have it written anew."""
        self.halted = error
        self._journal.drop()

    async def check(self) -> None:
        """Raise while the training has not begun, saying what it does, and when it has stopped."""
        if self.halted is not None:
            raise self.halted
        if not self._begun.is_set():
            raise RuntimeError(self._doing)

    @property
    def collector(self) -> Collector | None:
        """Takes the sums of the present collection, if there is one."""
        if self.state.phase != "collecting" or self.state.cohort is None:
            return None
        # A cohort that was opened again is collected anew: its selectors' sums have grown meanwhile.
        name = rounds.collection(self._rules, self.state.cohort)
        if self._collector is None or self._collector[0] != name:
            self._collector = (name, Collector(self._layout, self._models, self._rooms))
        return self._collector[1]

    def _drop_parts(self) -> None:
        """Of sums that nobody waits for any more nothing is kept."""
        if self._collector is None:
            return
        _, collector = self._collector
        if self.collector is collector and self.state.cohort is not None:
            collector.parts.retain(self.state.cohort.counting)
        elif self.state.phase == "aggregating":
            collector.parts.close()
        else:
            collector.give_up()

    def orders(self, name: str, life: str) -> Orders:
        """What a selector should be doing now.

        Clients are sent home only once the last report is recorded: after a crash before that they are needed again.
        After a stop they never are.
        """
        orders = rounds.orders(self._rules, self.state, name, life)
        return orders if self._recorded or self._stopped else msgspec.structs.replace(orders, finished=None)

    def claim(self, wanted: Claim) -> Claimed:
        """Whether a selector may accept the update of another one's ticket, or what became of it."""
        if (fate := self._fates.of(wanted.cohort, wanted.ticket)) is not None:
            return Claimed(answer=fate)
        answer = rounds.claim(self.state, wanted, time.time())
        self.happened(wanted)
        return answer

    def require_wanted(self, meta: Meta) -> Collector:
        """What takes this sum. Raises `round_over` when it is not asked for."""
        collector, cohort = self.collector, self.state.cohort
        if (
            collector is None
            or cohort is None
            or (meta.cohort, meta.collection) != (cohort.id, rounds.collection(self._rules, cohort))
            or meta.life not in cohort.counting
        ):
            raise FedotaError("round_over", "The sum is not asked for now.")
        return collector

    async def take(self, meta: Meta, numbers: Memory | Spooled) -> None:
        """A selector hands its sum over. Raises `conflict` when it cannot be used."""
        collector = self.require_wanted(meta)
        try:
            await collector.take(meta, numbers)
        except FedotaError as error:
            if error.problem.code != "conflict":
                raise
            _log.error("a sum was refused", life=meta.life, error=str(error))
            self.happened(Spoiled(life=meta.life, cohort=meta.cohort))
            raise
        finally:
            if collector.damaged:
                self._due.set()  # `conclude` sees it
        if collector is self.collector:
            given = of_updates(meta.accepted)
            reported = len(meta.accepted)
            self.happened(Handed(life=meta.life, cohort=meta.cohort, reported=reported, contributions=given))

    async def conclude(self) -> None:
        """Compute and store checkpoints whenever a round has come to that."""
        while True:
            await self._due.wait()
            self._due.clear()
            if (collector := self.collector) is not None:  # another, that was given up, does no harm any more
                collector.require_whole()
            if self.state.phase == "aggregating":
                await self._conclude()

    async def _conclude(self) -> None:
        assert self._collector is not None and self.state.cohort is not None
        _, collector = self._collector
        cohort, base, round_, attempt = self.state.cohort.id, self.state.base, self.state.round, self.state.attempt
        self._collector = None  # whatever happens now, the total is ours
        total = await collector.close()
        model = await asyncio.to_thread(self._compute, base, total)
        sha256 = model.sha256
        result = Result(
            model=model,
            reported=total.count,
            examples=total.examples,
            participants=collector.participants,
            metrics=collector.metrics,
            contributions=collector.contributions,
        )
        place = f"problems/{self._settings.problem_id}/checkpoints/{self._settings.run}/{round_}-{sha256[:16]}"
        checkpoint = Checkpoint(key=f"{place}.safetensors", sha256=sha256, size=model.size)
        given = words.given(self.state.cohort, result)
        lineage = manifest(self._rules, round_, attempt, base, result, given)
        await asyncio.to_thread(self._storing.prepare, checkpoint, lineage)
        self._digests = [base.sha256, sha256]  # a selector may still be fetching the one before
        lives = list(collector.lives)
        self.happened(Aggregated(cohort=cohort, lives=lives, result=result, checkpoint=checkpoint))
        if self._ended == Ended(cohort=cohort, counted=lives):  # else nobody listened, and nothing counts
            self._fates.ended(cohort, collector.accepted)
        if checkpoint.key in self.state.unrecorded:
            self._storing.add(checkpoint)
        await self._sweep()

    def _compute(self, base: ModelRef, total: WeightedSum) -> ModelRef:
        """The next weights, straight into their file: they are never in memory as a whole."""
        sha256, size, draft = hashlib.sha256(), 0, self._models / "next"
        hashed: deque[Future[None]] = deque()
        with (
            opened(self.model_file(base.sha256)) as before,
            draft.open("wb") as file,
            ThreadPoolExecutor(1) as beside,
        ):
            for piece in aggregate(self._strategy, self._layout, before, total):
                hashed.append(beside.submit(sha256.update, piece))  # which takes as long as all the rest
                if len(hashed) > _AHEAD:
                    hashed.popleft().result()
                size += file.write(piece)
        draft.replace(self.model_file(sha256.hexdigest()))
        return ModelRef(sha256=sha256.hexdigest(), size=size)

    async def _sweep(self) -> None:
        """Remove the weights that nobody needs any more. A draft of those that are needed stays: a download goes on."""
        needed = {self.model_file(sha256).stem for sha256 in (*self._digests, *self._storing.digests)}
        there = [*self._models.glob("*.safetensors"), *self._models.glob("*.new")]
        await asyncio.to_thread(_remove, [path for path in there if path.stem not in needed])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
