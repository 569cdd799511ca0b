"""Nobody who sits on the lock of the log stops its callers for good."""

import asyncio
import time

import pytest

from fedota.errors import FedotaError
from fedota.events import NewEvent, uuid7
from fedota.kernel.event_log import Append, Context
from fedota.kernel.migrations import PROCESSES
from tests.contract.ground import Ground, requested
from tests.support.services import new_id

CONTEXT = Context(actor="test", correlation=uuid7())
PATIENCE = 10.0  # seconds: what a command may take


def request(key: str) -> Append:
    """A request to append to a new stream."""
    problem_id = new_id()
    event = NewEvent(data=requested(problem_id))
    return Append(subject=f"problems/{problem_id}", events=[event], context=CONTEXT, key=key)


async def test_an_append_behind_a_transaction_left_open_is_told_so(ground: Ground) -> None:
    """It answers `unavailable` before its caller gives up, and nothing was done; afterwards it goes through."""
    log, asked = ground.logs["problems"], request("k")
    async with ground.superuser() as connection:
        await connection.execute("begin; select from fedota.head for update")
        begun = time.monotonic()
        first = asyncio.create_task(log.append(asked))
        await _waits_for_the_lock(ground)
        later = [asyncio.create_task(log.append(request(f"later {number}"))) for number in range(3)]
        outcomes = await asyncio.gather(first, *later, return_exceptions=True)
        assert time.monotonic() - begun < PATIENCE
        assert [_code(outcome) for outcome in outcomes] == ["unavailable"] * 4
        assert await log.head() == 0  # who only reads was not held up
        await connection.execute("rollback")
    answer = await log.append(asked)
    assert (answer.position, answer.repeated) == (1, False)


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_process_left_in_a_transaction_gives_its_locks_back(ground: Ground, process: str) -> None:
    """PostgreSQL itself ends its session: each login role is made so."""
    async with ground.as_role(process) as connection:
        assert await connection.fetchval("show idle_in_transaction_session_timeout") == "1min"


def _code(outcome: object) -> str:
    assert isinstance(outcome, FedotaError)
    return outcome.problem.code


async def _waits_for_the_lock(ground: Ground) -> None:
    """Return when a session of this database waits for a lock."""
    async with ground.superuser() as connection:
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        async with asyncio.timeout(5):
            while not await connection.fetchval(waiting):  # noqa: ASYNC110 - PostgreSQL tells nobody
                await asyncio.sleep(0.01)
