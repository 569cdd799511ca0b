"""What happened, in a sentence: for every feed of events."""

from fedota.events import EventData, problems, storage
from fedota.events import orchestrator as infrastructure
from fedota.events.rounds import RoundUpdated


def sentence(data: EventData) -> str:
    """One plain sentence on an event."""
    return _said(data).rstrip(".") + "."


def _said(data: EventData) -> str:
    match data:
        case RoundUpdated():  # first: most events are reports
            return _round(data)
        case problems.ProblemCreated():
            return f"The problem “{data.name}” was published"
        case problems.ProblemRevised():
            return "The setter revised the problem"
        case problems.ProblemStarted():
            return f"Training was started (run {data.run}, {data.plan.rounds} rounds)"
        case problems.ProblemStopped():
            return f"Training was stopped: {data.reason}"
        case problems.ProblemCompleted():
            return f"Training completed with round {data.rounds}"
        case problems.ParticipationRequested():
            return f"{data.organization} asked to take part"
        case problems.ParticipationApproved():
            return f"{data.organization} was approved"
        case problems.ParticipationRefused():
            return f"{data.organization} was refused: {data.reason}"
        case problems.ParticipationRevoked():
            return f"The participation of {data.organization} was revoked: {data.reason}"
        case storage.FilesStored():
            names = ", ".join(file.name for file in data.files)
            return f"Stored and verified: {names}"
        case storage.FilesRejected():
            names = ", ".join(f"{file.name} ({file.reason.rstrip('.')})" for file in data.files)
            return f"Rejected: {names}"
        case storage.FilesDeleted():
            return f"Deleted: {', '.join(data.names)}"
        case _:
            return _infrastructure(data)


def _infrastructure(data: EventData) -> str:
    match data:
        case infrastructure.InfraSpawned():
            count = len(data.selectors)
            return f"Coordinator and {count} {'selector' if count == 1 else 'selectors'} are running"
        case infrastructure.InfraFailed():
            return f"The infrastructure failed: {data.reason}"
        case infrastructure.InfraDegraded():
            return f"{data.component} is down and being restarted: {data.reason}"
        case infrastructure.InfraRecovered():
            return f"{data.component} is running again"
        case infrastructure.InfraStopped():
            return f"The infrastructure was removed: {data.reason}"
        case _:
            return type(data).__name__


def _round(data: RoundUpdated) -> str:
    attempt = f", attempt {data.attempt}" if data.attempt > 1 else ""
    because = f": {data.reason}" if data.reason else ""
    return f"Round {data.round}{attempt} — {data.stage}{because}"
