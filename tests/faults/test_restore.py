"""PostgreSQL is restored from a copy that is older than the event stream: nobody invents a future, and it is said."""

import random
from pathlib import Path
from typing import Any, Final

from nats.js.errors import NotFoundError

from fedota.contracts import subjects
from tests.faults.checker import check, quiet
from tests.faults.ledger import Ledger
from tests.faults.load import Load, a_report, an_append, persist
from tests.faults.servers import PATIENCE
from tests.faults.stand import USUAL, Stand, new_place
from tests.support.services import new_id
from tests.support.waiting import until

_PROJECTING: Final = ("problems", "gateway")


async def test_a_log_from_an_older_copy(tmp_path: Path, chance: random.Random) -> None:
    """The relay stops and says what to do, read models follow the log, and after the remedy all agree again."""
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance) as load:
            await load.goes_on(30)
        older_head = await quiet(stand, _PROJECTING)
        older = new_place(stand.directory)
        await stand.postgres.stop()
        stand.postgres.copy(older)
        await stand.postgres.start()
        async with Load.on(stand, chance) as lost:
            await lost.goes_on(30)
        ahead = await quiet(stand, _PROJECTING)
        assert ahead > older_head
        before = await stand.stream()

        await stand.postgres.stop()
        stand.postgres.restore(older)
        await stand.postgres.start()
        await until(lambda: _says(stand, f"{ahead} events, the log only {older_head}"), "the relay says so", PATIENCE)

        # the restored log goes on, to beyond where the stream stands: it has other events at the same positions
        ledger, appended = load.ledger, older_head
        while appended <= ahead + 5:
            appended = await _append(stand, ledger)
        await until(lambda: _says(stand, f"different events at position {ahead}"), "the relay says so", PATIENCE)
        assert await stand.stream() == before, "nothing was appended to a stream that tells another story"
        async with stand.superuser() as connection:
            feed = "select count(*) from gateway.feed f join fedota.events e using (position) where e.type <> f.type"
            assert await connection.fetchval(feed) == 0, "a read model followed the stream instead of the log"

        # the remedy that it names
        async with stand.nats() as client:
            try:
                await client.jetstream().delete_stream(subjects.STREAM)
            except NotFoundError:
                raise AssertionError("the stream was gone already") from None
        await stand.is_well(*USUAL)
        async with Load.on(stand, chance, ledger) as load:
            await load.goes_on()
        found = await check(stand, ledger, chance)
        assert found.events > ahead


async def _says(stand: Stand, words: str) -> bool:
    said: dict[str, Any] = (await stand.readiness_of("relay")).get("failing", {})
    return words in said.get("diverged", "")


async def _append(stand: Stand, ledger: Ledger) -> int:
    async with stand.log("rounds") as log:
        append = an_append([a_report(new_id(), 1)])
        ledger.tries(append)
        answer = await persist(lambda: log.append(append))
        ledger.accepts(append, answer)
        return int(answer.position)
