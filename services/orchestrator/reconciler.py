"""Makes what runs agree with what should run, problem by problem: a slow one never holds up another."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Final

import structlog

from fedota.errors import FedotaError
from fedota.events import NewEvent, to_json
from fedota.kernel.database import Pool
from fedota.kernel.event_log import Append, Context, EventLog, fingerprint
from fedota.kernel.projection import Projector
from services.orchestrator.domain import Death, Launch, Remove, Say, Step, decide, namespace_of, problem_of
from services.orchestrator.launchers import Launcher
from services.orchestrator.projection import changed, load, unsettled
from services.orchestrator.workers import WAITED_OUT, Workers

_EVERY: Final = 3.0  # seconds between looks at everything, woken or not
_log = structlog.get_logger(__name__)


class Reconciler:
    """Takes the steps that `domain.decide` names; `run` until cancelled.

    `on_death` is called for each component that died. What is over is left up for `farewell` seconds, so that clients
    that come late hear of it, unless the problem is started again meanwhile.
    """

    def __init__(
        self,
        pool: Pool,
        log: EventLog,
        projector: Projector,
        launcher: Launcher,
        on_death: Callable[[], None],
        farewell: float,
    ) -> None:
        self._pool = pool
        self._log = log
        self._projector = projector
        self._launcher = launcher
        self._on_death = on_death
        self._farewell = farewell
        self._farewells: dict[str, float] = {}  # when those end that have begun, by namespace; monotonic
        self._deaths: dict[str, list[Death]] = {}  # not told yet, by problem

    async def run(self) -> None:
        """Reconcile forever; faults of the database and of NATS are waited out."""
        await self._catch_up()
        async with Workers.open(self._settle) as workers, asyncio.TaskGroup() as group:
            group.create_task(self._follow_launcher(workers))
            group.create_task(self._follow_log(workers))
            group.create_task(self._look_regularly(workers))

    async def _catch_up(self) -> None:
        """An earlier life may have said more than the read model knows: deciding before it does would say it twice."""
        while True:
            try:
                return await self._projector.catch_up()
            except WAITED_OUT as error:
                _log.warning("waiting for the read model", error=str(error) or type(error).__name__)
                await asyncio.sleep(1)

    async def _follow_launcher(self, workers: Workers) -> None:
        async for change in self._launcher.watch():
            problem_id = problem_of(change.namespace)
            if change.death:
                self._on_death()
                self._deaths.setdefault(problem_id, []).append(change.death)
            workers.wake([problem_id])

    async def _follow_log(self, workers: Workers) -> None:
        """A wake that a fault takes away is made up for by the next regular look."""
        seen = self._projector.position
        while True:
            with suppress(FedotaError):  # nothing new in time
                await self._projector.wait_for(seen + 1, timeout=_EVERY)
            after, seen = seen, self._projector.position
            with suppress(*WAITED_OUT):
                workers.wake(await changed(self._pool, after))

    async def _look_regularly(self, workers: Workers) -> None:
        while True:
            try:
                existing = [problem_of(namespace) for namespace in await self._launcher.namespaces()]
                workers.wake({*existing, *await unsettled(self._pool)})
            except WAITED_OUT as error:
                _log.warning("could not look", error=str(error) or type(error).__name__)
            await asyncio.sleep(_EVERY)

    async def _settle(self, problem_id: str) -> float | None:
        """Take steps until there is none, or one that has time: for so many seconds."""
        left = None
        while (step := await self._next(problem_id)) and (left := self._left(step)) is None:
            await self._take(problem_id, step)
        self._deaths.pop(problem_id, None)  # what was not told is of a run that is over
        return left

    def _left(self, step: Step) -> float | None:
        """The seconds that a namespace stays for its farewell; None when the step is to be taken now."""
        if not (isinstance(step, Remove) and step.farewell):
            return None
        if step.namespace not in self._farewells:
            _log.info("over", namespace=step.namespace, farewell=self._farewell)
            self._farewells[step.namespace] = monotonic() + self._farewell
        left = self._farewells[step.namespace] - monotonic()
        return left if left > 0 else None

    async def _next(self, problem_id: str) -> Step | None:
        state = await load(self._pool, problem_id)
        infra = await self._launcher.find(namespace_of(problem_id))
        return decide(state, infra, self._deaths.get(problem_id, ()))

    async def _take(self, problem_id: str, step: Step) -> None:
        match step:
            case Launch(spec=spec):
                _log.info("launching", namespace=spec.namespace, run=spec.run)
                await self._launcher.launch(spec)
            case Remove(namespace=namespace):
                _log.info("removing", namespace=namespace)
                await self._launcher.stop(namespace)
                self._farewells.pop(namespace, None)
            case Say():
                await self._say(step)
                if step.death:
                    self._deaths[problem_id].remove(step.death)

    async def _say(self, step: Say) -> None:
        """Append, and wait until the read model knows it: the next decision builds on it."""
        [cause] = await self._log.read(step.cause - 1, limit=1)
        appended = await self._log.append(
            Append(
                subject=f"orchestrator/{step.data.problem_id}",
                events=[NewEvent(data=step.data)],
                context=Context.of_event("orchestrator", cause),
                key=step.key,
                fingerprint=fingerprint(to_json(step.data)),
            )
        )
        _log.info("said", type=type(step.data).__name__, problem_id=step.data.problem_id, position=appended.position)
        await self._projector.wait_for(appended.position)
