"""What `services/orchestrator` records: the coordinator and selectors of each problem."""

from fedota.events.envelope import EventData


class InfraSpawned(EventData, frozen=True, kw_only=True):
    """Coordinator and selectors run and answer at these addresses. `run` is that of `ProblemStarted`.

    `authority` is the certificate (PEM) of the authority behind the selectors' own; empty where they speak plain HTTP.
    """

    run: int
    namespace: str
    backend: str
    coordinator: str
    selectors: list[str]
    authority: str = ""


class InfraFailed(EventData, frozen=True, kw_only=True):
    """The infrastructure could not be brought up or kept up; `log` holds the last lines that it wrote."""

    run: int
    namespace: str
    reason: str
    log: list[str]


class InfraDegraded(EventData, frozen=True, kw_only=True):
    """A component (`coordinator`, `selector-0`, …) died and is being restarted."""

    run: int
    namespace: str
    component: str
    reason: str
    log: list[str]


class InfraRecovered(EventData, frozen=True, kw_only=True):
    """A component that had died runs again, at the same address."""

    run: int
    namespace: str
    component: str


class InfraStopped(EventData, frozen=True, kw_only=True):
    """Nothing of the problem's infrastructure is left."""

    run: int
    namespace: str
    reason: str
