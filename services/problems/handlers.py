"""What problems does when it is asked, and when others' events end a run."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from fedota.contracts.commands import (
    ApproveParticipation,
    Command,
    CreateProblem,
    IssueToken,
    RefuseParticipation,
    Reply,
    Request,
    RequestParticipation,
    ReviseProblem,
    RevokeParticipation,
    StartProblem,
    StopProblem,
)
from fedota.contracts.participation import sign
from fedota.errors import FedotaError
from fedota.events import Event, EventData, NewEvent
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import ModelFile
from fedota.events.rounds import RoundUpdated
from fedota.kernel.bus import CommandHandler
from fedota.kernel.event_log import Append, Appended, Context, EventLog, fingerprint, log_needed
from fedota.kernel.settings import Secret
from services.problems.domain import State, decide, evolve, model_of, react, require_approved

_TRIES: Final = 5  # only another process of problems can come in between
_DAY: Final = 86_400  # seconds
_CHANGES: Final[tuple[type[Command], ...]] = (
    CreateProblem,
    ReviseProblem,
    StartProblem,
    StopProblem,
    RequestParticipation,
    ApproveParticipation,
    RefuseParticipation,
    RevokeParticipation,
)
Decision = Callable[[State | None], Sequence[EventData]]


class Cause(NamedTuple):
    """What a change goes back to: the same `key` and `body` never make it twice."""

    context: Context
    key: str
    body: bytes


class Handlers:
    """Load, decide, append."""

    def __init__(self, log: EventLog, token_key: Secret, token_days: int) -> None:
        self._log = log
        self._token_key = token_key
        self._token_seconds = token_days * _DAY
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def commands(self) -> dict[type[Command], CommandHandler]:
        """Who answers which command."""
        return {**dict.fromkeys(_CHANGES, self.change), IssueToken: self.issue_token}

    async def change(self, request: Request, command: Command) -> Reply:
        """Do what a person asks for, or say why not."""
        body = fingerprint(type(command).__name__.encode(), bytes(request.command))
        cause = Cause(Context.of_request(request), f"{request.actor}/{request.key}", body)
        with log_needed():
            model = await self._model(command)
            decision = partial(decide, command=command, model=model)
            appended = await self._append(command.problem_id, decision, cause)
        return Reply(position=appended.position if appended else 0)

    async def issue_token(self, _: Request, command: IssueToken) -> Reply:
        """A participation token for an organization that is approved now."""
        with log_needed():
            state, _version = await self._load(command.problem_id)
        require_approved(state, command.organization)
        seconds = self._token_seconds
        return Reply(result=sign(self._token_key.reveal(), command.problem_id, command.organization, seconds=seconds))

    async def react(self, event: Event, data: RoundUpdated | InfraFailed) -> None:
        """End the run that the event is the last word on."""
        if isinstance(data, RoundUpdated) and not data.final:
            return
        cause = Cause(Context.of_event("problems", event), f"problems/{event.id}", fingerprint(event.id.bytes))
        await self._append(event.problem_id, partial(react, data=data), cause)

    async def _append(self, problem_id: str, decision: Decision, cause: Cause) -> Appended | None:
        """Decide on the newest state and record that; None when there was nothing to record.

        In this process a problem's changes take turns: a hundred organizations that join in the same moment wait for
        each other and none of them fails.
        """
        async with self._turns.setdefault(problem_id, asyncio.Lock()):
            for _ in range(_TRIES - 1):
                try:
                    return await self._try(problem_id, decision, cause)
                except FedotaError as error:
                    if error.problem.code != "conflict":
                        raise
            return await self._try(problem_id, decision, cause)

    async def _try(self, problem_id: str, decision: Decision, cause: Cause) -> Appended | None:
        state, version = await self._load(problem_id)
        try:
            events = decision(state)
        except FedotaError:
            # Perhaps it is refused because it was done already: the state holds what the first one of its key did.
            if answered := await self._log.recorded(cause.key, cause.body):
                return answered
            raise
        if not events:
            return None
        return await self._log.append(
            Append(
                subject=_stream(problem_id),
                events=[NewEvent(data=data) for data in events],
                context=cause.context,
                expected=version,
                key=cause.key,
                fingerprint=cause.body,
            )
        )

    async def _load(self, problem_id: str) -> tuple[State | None, int]:
        events = await self._log.stream(_stream(problem_id))
        state: State | None = reduce(evolve, (event.data for event in events), None)
        return state, len(events)

    async def _model(self, command: Command) -> ModelFile | None:
        """The model that a start begins with, from storage's own stream.

        The log holds what storage has answered for the moment it answers: a setter who was told that the model is
        stored can start at once, which a read model of ours, always a little behind, could not promise. A model that
        is replaced while the start is being decided makes no difference: objects are kept by their content and never
        change, and the start then simply came first.
        """
        if not isinstance(command, StartProblem):
            return None
        return model_of(event.data for event in await self._log.stream(f"storage/{command.problem_id}"))


def _stream(problem_id: str) -> str:
    return f"problems/{problem_id}"
