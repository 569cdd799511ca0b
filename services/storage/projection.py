"""Storage keeps no read model: a problem's files are read from its own short stream. Only the manifest follows events.

The reaction runs before the checkpoint moves, so a crash between event and manifest is made good at the next start.
"""

from fedota.events.storage import FilesDeleted, FilesStored
from fedota.kernel.projection import Projection
from services.storage.handlers import Handlers


def projection(handlers: Handlers) -> Projection:
    """What storage does with its own events."""
    return Projection(reactions=dict.fromkeys((FilesStored, FilesDeleted), handlers.write_manifest))
