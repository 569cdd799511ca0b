"""One of several processes that append at once: `python -m tests.contract.writer <writers> <appends>`.

Each append is of one to three events. Prints the ids of what it wrote, one a line.
"""

import asyncio
import os
import sys
from uuid import UUID, uuid4

from fedota.events import NewEvent, uuid7
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.settings import Secret
from tests.contract.ground import requested

_CONTEXT = Context(actor="writer", correlation=uuid7())


async def _write(url: str, writers: int, appends: int) -> list[UUID]:
    async with connect_pool(Secret(url), "problems", size=2) as pool, EventLog.open(pool) as log:

        async def writer() -> list[UUID]:
            problem_id, written = str(uuid4()), []
            for number in range(appends):
                events = [NewEvent(data=requested(problem_id)) for _ in range(1 + number % 3)]
                await log.append(Append(subject=f"problems/{problem_id}", events=events, context=_CONTEXT))
                written += [event.id for event in events]
            return written

        return [id_ for ids in await asyncio.gather(*(writer() for _ in range(writers))) for id_ in ids]


if __name__ == "__main__":
    for id_ in asyncio.run(_write(os.environ["FEDOTA_DATABASE_URL"], int(sys.argv[1]), int(sys.argv[2]))):
        sys.stdout.write(f"{id_}\n")
