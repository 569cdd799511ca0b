"""One run of a problem: the state machine with its clock, its reports, and the work that its stages ask for."""

import asyncio
import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from fedota.contracts.runtime import CoordinatorSettings, Report, Resume
from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.events.problems import ModelFile
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.aggregation import WeightedSum, aggregate, choose_strategy, sum_size
from fedota.runtime.bodies import mapped
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.coordinator.objects import Objects, StoreError
from fedota.runtime.coordinator.platform import Platform, insist
from fedota.runtime.coordinator.reporter import Reporter
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Event,
    Handed,
    Result,
    Revoked,
    Rules,
    Spoiled,
    Stored,
    Tick,
    Trouble,
)
from fedota.runtime.protocol import Claim, Claimed, Meta, ModelRef, Orders
from fedota.runtime.tensors import read_layout

_BEAT: Final = 1.0  # seconds
_STOOD_STILL: Final = 3.0  # seconds: a beat that is so late means that the process did not run
_log = structlog.get_logger(__name__)


class StartError(Exception):
    """The coordinator cannot begin; the message says why and what to do."""


class Training:
    """Runs rounds. Whoever changes anything calls `happened`; `changed` is set after each change."""

    def __init__(self, settings: CoordinatorSettings, rules: Rules, directory: Path) -> None:
        plan = settings.plan
        try:
            self._strategy = choose_strategy(plan.strategy.name, plan.strategy.parameters)
        except ValueError as error:
            raise StartError(f"The plan's strategy cannot be used: {error}. Correct the plan.") from None
        self._settings = settings
        self._rules = rules
        self._models = directory / "models"
        self._moved = asyncio.Event()
        self._due = asyncio.Event()
        self._collector: tuple[str, Collector] | None = None
        self.halted: FedotaError | None = None
        self.closing = False
        self._recorded = False  # the run's last report
        self._beat = time.monotonic()

    async def load(self, platform: Platform, objects: Objects, trouble: Any = lambda _: None) -> None:
        """Find out where the run stands, and have the weights to go on with. Asks until it is answered."""
        run = self._settings.run
        resume = await insist(lambda: platform.resume(run), retried=(FedotaError, msgspec.DecodeError), trouble=trouble)
        self._objects = objects
        begins: ModelFile | Checkpoint = resume.checkpoint or self._settings.model
        self._digests = [begins.sha256]
        await self._have(begins, trouble)
        self._base = ModelRef(sha256=begins.sha256, size=begins.size)
        try:
            self._layout = read_layout(self.model_file(begins.sha256))
        except FedotaError as error:
            raise StartError(f"The model {begins.key} cannot be trained: {error.problem.detail}") from None
        self._platform = platform
        self.reporter = Reporter(self._send, resume.report, self._counts)
        self._begin(resume)
        _log.info("training", round=resume.round, attempt=resume.attempt, finished=resume.finished)

    async def _have(self, object_: ModelFile | Checkpoint, trouble: Any) -> None:
        await asyncio.to_thread(self._models.mkdir, mode=0o700, exist_ok=True)
        path = self.model_file(object_.sha256)
        for other in self._models.iterdir():
            if other != path:
                other.unlink()
        if path.exists() and await asyncio.to_thread(_digest, path) == object_.sha256:
            return
        await insist(
            lambda: self._objects.fetch(object_.key, object_.sha256, object_.size, path),
            retried=(StoreError, FedotaError, msgspec.DecodeError),
            trouble=trouble,
        )

    def _begin(self, resume: Resume) -> None:
        where: dict[str, Any] = {"round": resume.round, "attempt": resume.attempt, "base": self._base}
        self._recorded = resume.finished
        if resume.finished:
            self.state = rounds.over(**where, now=time.time())
            return
        self.state, reports = rounds.start(self._rules, **where, now=time.time())
        self._tell(reports)
        self.happened(Revoked(organizations=resume.revoked))

    def model_file(self, sha256: str) -> Path:
        """Where the weights with this digest lie while they are in use."""
        return self._models / f"{sha256}.safetensors"

    def has_model(self, sha256: str) -> bool:
        """Whether these weights are in use."""
        return sha256 in self._digests

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
        self.state, reports = rounds.step(self._rules, before, event, time.time())
        self._tell(reports)
        if self.state != before:
            self._wake()
            self._due.set()
            self.reporter.counts_changed()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _tell(self, reports: list[RoundUpdated]) -> None:
        for one in reports:
            _log.info("round", round=one.round, attempt=one.attempt, stage=one.stage, reason=one.reason)
            self.reporter.tell(one)

    def _counts(self) -> RoundUpdated | None:
        """The stage that was told last, with its present counts."""
        if self.state.phase in ("configuration", "finished"):  # these are told as a whole
            return None
        return words.report(self._rules, self.state, time.time())

    async def keep_time(self) -> None:
        """Let the machine know that time passes."""
        while True:
            self._beat = time.monotonic()
            wait = min(_BEAT, max(0.001, rounds.wakes(self.state) - time.time()))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), _BEAT if self.halted else wait)
            self.happened(Tick())

    async def report(self) -> None:
        """Send the reports; when one is refused the training stops, for nothing after it could be recorded."""
        try:
            await self.reporter.run()
        except FedotaError as error:
            self.halted = error
            _log.critical("a report was refused: the training stops", error=str(error))
            await asyncio.Event().wait()  # it is for a person to see why, and starting again would not change it

    async def _send(self, report: Report) -> None:
        reported = await self._platform.report(report)
        self._recorded = report.update.final
        self.happened(Revoked(organizations=reported.revoked))
        self._wake()

    async def check(self) -> None:
        """Raise when the training has stopped."""
        if self.halted is not None:
            raise self.halted

    @property
    def collector(self) -> Collector | None:
        """Takes the sums of the present collection, if there is one."""
        if self.state.phase != "collecting" or self.state.cohort is None:
            return None
        # A cohort that was opened again is collected anew: its selectors' sums have grown meanwhile.
        name = rounds.collection(self._rules, self.state.cohort)
        if self._collector is None or self._collector[0] != name:
            self._collector = (name, Collector(self._layout))
        return self._collector[1]

    @property
    def sum_size(self) -> int:
        """The bytes of a sum over the model."""
        return sum_size(self._layout)

    def orders(self, name: str, life: str) -> Orders:
        """What a selector should be doing now.

        Clients are sent home only once the last report is recorded: after a crash before that they are needed again.
        """
        orders = rounds.orders(self._rules, self.state, name, life)
        return orders if self._recorded else msgspec.structs.replace(orders, finished=None)

    def claim(self, wanted: Claim) -> Claimed:
        """Whether a selector may accept the update of another one's ticket."""
        answer = rounds.claim(self.state, wanted, time.time())
        self.happened(wanted)
        return answer

    def require_wanted(self, meta: Meta) -> Collector:
        """What takes this sum. Raises `round_over` when it is not asked for."""
        collector, cohort = self.collector, self.state.cohort
        if collector is None or cohort is None or meta.cohort != cohort.id or meta.life not in cohort.counting:
            raise FedotaError("round_over", "The sum is not asked for now.")
        return collector

    async def take(self, meta: Meta, numbers: memoryview) -> None:
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
        if collector is self.collector:
            self.happened(Handed(life=meta.life, cohort=meta.cohort, reported=len(meta.accepted)))

    async def conclude(self) -> None:
        """Compute and store checkpoints whenever a round has come to that."""
        while True:
            await self._due.wait()
            self._due.clear()
            if self.state.phase == "aggregating":
                await self._conclude()

    async def _conclude(self) -> None:
        assert self._collector is not None
        _, collector = self._collector
        base, round_, attempt = self.state.base, self.state.round, self.state.attempt
        total, self._collector = await collector.close(), None
        body, sha256 = await asyncio.to_thread(self._compute, base, total)
        model = ModelRef(sha256=sha256, size=len(body))
        self._keep(base.sha256, sha256)
        result = Result(
            model=model,
            reported=total.count,
            examples=total.examples,
            participants=collector.participants,
            metrics=collector.metrics,
        )
        self.happened(Aggregated(result=result))
        lineage = _lineage(self._rules, round_, attempt, base, result)
        place = f"problems/{self._settings.problem_id}/checkpoints/{self._settings.run}/{round_}-{sha256[:16]}"
        await asyncio.gather(
            self._store(f"{place}.safetensors", body, sha256),
            self._store(f"{place}.json", memoryview(lineage), hashlib.sha256(lineage).hexdigest()),
        )
        checkpoint = Checkpoint(key=f"{place}.safetensors", sha256=sha256, size=len(body))
        self.happened(Stored(checkpoint=checkpoint))

    def _compute(self, base: ModelRef, total: WeightedSum) -> tuple[memoryview, str]:
        body = aggregate(self._strategy, self._layout, mapped(self.model_file(base.sha256)), total)
        sha256 = hashlib.sha256(body).hexdigest()
        draft = self._models / "next"
        draft.write_bytes(body)
        draft.replace(self.model_file(sha256))
        return body, sha256

    def _keep(self, *digests: str) -> None:
        for old in set(self._digests) - set(digests):
            self.model_file(old).unlink(missing_ok=True)
        self._digests = list(digests)

    async def _store(self, key: str, body: memoryview, sha256: str) -> None:
        def trouble(why: str) -> None:
            _log.warning("a checkpoint is not stored yet", error=why)
            self.happened(Trouble(reason=why))

        await insist(
            lambda: self._objects.store(key, body, sha256),
            retried=(StoreError, FedotaError, msgspec.DecodeError),
            trouble=trouble,
        )


def _lineage(rules: Rules, round_: int, attempt: int, base: ModelRef, result: Result) -> bytes:
    """A checkpoint's manifest: what it was made of, and how."""
    plan = rules.plan
    return msgspec.json.format(
        to_json(
            {
                "problem_id": rules.problem_id,
                "run": rules.run,
                "round": round_,
                "attempt": attempt,
                "sha256": result.model.sha256,
                "size": result.model.size,
                "base": {"sha256": base.sha256, "size": base.size},
                "strategy": plan.strategy,
                "updates": result.reported,
                "examples": result.examples,
                "participants": result.participants,
                "metrics": result.metrics,
            }
        ),
        indent=2,
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
