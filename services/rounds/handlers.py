"""What rounds does when a coordinator reports, and when one asks where to go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedota.contracts import subjects
from fedota.contracts.runtime import Report, Reported, ResumeRequest, RevokedOrganizations, RevokedRequest
from fedota.errors import FedotaError
from fedota.events import Event, NewEvent, to_json
from fedota.events.rounds import RoundUpdated
from fedota.kernel.bus import Answer, read_request
from fedota.kernel.database import Pool
from fedota.kernel.event_log import Append, Appended, Context, EventLog, fingerprint, log_needed
from fedota.kernel.projection import Projector
from services.rounds.domain import State, current_run, decide, resume, stopped
from services.rounds.projection import load

_PAGE: Final = 200  # reports read at once on the way back to the last checkpoint
_TRIED_AGAIN: Final = ("report_refused", "conflict", "unavailable")


class Handlers:
    """One method for each thing that a coordinator says; whose it is, its subject tells.

    A coordinator's NATS account reaches the subjects of its own problem and no other.
    """

    def __init__(self, pool: Pool, log: EventLog, projector: Projector) -> None:
        self._pool = pool
        self._log = log
        self._projector = projector

    @property
    def answers(self) -> dict[str, Answer]:
        """Who answers on which subject."""
        return {
            subjects.runtime("*", "report"): self.report,
            subjects.runtime("*", "resume"): self.resume,
            subjects.runtime("*", "revoked"): self.revoked,
        }

    async def report(self, subject: str, body: bytes) -> bytes:
        """Record a report, or refuse it, saying what was expected."""
        update = read_request(body, Report).update
        problem_id = _problem_of(subject)
        if update.problem_id != problem_id:
            raise FedotaError("report_refused", f"The report is about another problem, not about {problem_id}.")
        with log_needed(), _reworded(update):
            appended = await self._record(update)
            revoked = (await load(self._pool, problem_id)).revoked
        return to_json(Reported(position=appended.position, revoked=revoked))

    async def resume(self, subject: str, body: bytes) -> bytes:
        """Where the coordinator of a run goes on, from all that is in the log now."""
        run = read_request(body, ResumeRequest).run
        problem_id = _problem_of(subject)
        with log_needed():
            await self._projector.catch_up()
            state = await load(self._pool, problem_id)
            history = await self._history(problem_id, run)
        return to_json(resume(state, run, history))

    async def revoked(self, subject: str, body: bytes) -> bytes:
        """Whose participation was revoked and whether the run was stopped, for who has nothing to report."""
        run = read_request(body, RevokedRequest).run
        with log_needed():
            state = await load(self._pool, _problem_of(subject))
        return to_json(RevokedOrganizations(revoked=state.revoked, stopped=stopped(state, run)))

    async def _record(self, update: RoundUpdated) -> Appended:
        """Nothing is refused by a read model that is behind: it catches up with the log before the last word.

        Accepting needs no such care. A report that is quicker than the news of its run's end was made while the run
        went on, and whoever acts on it looks at the problem itself.
        """
        try:
            return await self._try(update)
        except FedotaError as error:
            if error.problem.code not in _TRIED_AGAIN:
                raise
        await self._projector.catch_up()
        return await self._try(update)

    async def _try(self, update: RoundUpdated) -> Appended:
        key, body = f"report/{update.problem_id}/{update.run}/{update.report}", fingerprint(to_json(update))
        state = await load(self._pool, update.problem_id)
        newest = await self._log.newest(_stream(update.problem_id), limit=1)
        try:
            events = decide(state, _update(newest[0]) if newest else None, update)
        except FedotaError:
            # Perhaps it is refused because it was recorded already, and only the answer was lost.
            if answered := await self._log.recorded(key, body):
                return answered
            raise
        return await self._log.append(
            Append(
                subject=_stream(update.problem_id),
                events=[NewEvent(data=data) for data in events],
                context=_context(state, update),
                expected=newest[0].version if newest else 0,
                key=key,
                fingerprint=body,
            )
        )

    async def _history(self, problem_id: str, run: int) -> list[RoundUpdated]:
        """The reports of a run, newest first, back to its last completed round or its beginning."""
        found: list[RoundUpdated] = []
        page = await self._log.newest(_stream(problem_id), limit=_PAGE)
        while page:
            for event in page:
                update = _update(event)
                if update.run < run:
                    return found
                if update.run == run:
                    found.append(update)
                    if update.stage == "completed":
                        return found
            page = await self._log.newest(_stream(problem_id), limit=_PAGE, before=page[-1].version)
        return found


@contextmanager
def _reworded(update: RoundUpdated) -> Iterator[None]:
    """A coordinator knows numbers of reports, not keys."""
    try:
        yield
    except FedotaError as error:
        if error.problem.code != "key_reused":
            raise
        raise FedotaError(
            "report_refused", f"Report {update.report} was recorded with other content. Ask where to resume."
        ) from None


def _context(state: State, update: RoundUpdated) -> Context:
    """A report goes back to the start of its run."""
    run = current_run(state, update.run)
    return Context(actor=f"coordinator:{update.problem_id}", correlation=run.correlation, causation=run.cause)


def _update(event: Event) -> RoundUpdated:
    assert isinstance(event.data, RoundUpdated), f"{event.type} in the stream of rounds"
    return event.data


def _problem_of(subject: str) -> str:
    return subject.split(".")[2]


def _stream(problem_id: str) -> str:
    return f"rounds/{problem_id}"
