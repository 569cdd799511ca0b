"""A process that rebuilds the gateway's read model and is killed on the way: `python -m tests.contract.rebuilder`.

It ends with -9 as soon as `KILL_AT` events are done, or, where that is not told, when it holds the live tables' locks.
"""

import asyncio
import os
import signal

from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.rebuilding import _Copy, rebuild
from fedota.kernel.settings import ProcessSettings, load
from tests.contract.models import Model


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    """Rebuild until killed."""
    settings = load(ProcessSettings)
    kill_at = int(os.environ.get("KILL_AT", 2**62))

    def told(position: int, _: int) -> None:
        if position >= kill_at:
            _die()

    replace = _Copy.replace_live

    async def replace_and_die(copy: _Copy) -> int:
        rows = await replace(copy)
        _die()
        return rows

    _Copy.replace_live = replace_and_die  # type: ignore[method-assign, assignment]
    async with connect_pool(settings.database_url, "gateway", size=3) as pool, EventLog.open(pool) as log:
        await rebuild(Model().projection, pool, log, told)


if __name__ == "__main__":
    asyncio.run(main())
