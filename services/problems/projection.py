"""Problems keeps no read model: each decision is made on the problem's own short stream. Only the end of a run follows
from others' events, and a crash between event and reaction is made good at the next start.
"""

from fedota.events.orchestrator import InfraFailed
from fedota.events.rounds import RoundUpdated
from fedota.kernel.projection import Projection
from services.problems.handlers import Handlers


def projection(handlers: Handlers) -> Projection:
    """What problems does with the events of others."""
    return Projection(reactions=dict.fromkeys((RoundUpdated, InfraFailed), handlers.react))
