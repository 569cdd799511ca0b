"""NATS is killed, paused, wiped, put back to an older state, while clients append and command."""

import asyncio
import random
from pathlib import Path
from typing import Final

from tests.faults.checker import check
from tests.faults.conftest import one_of_each
from tests.faults.load import Load
from tests.faults.stand import USUAL, Stand, new_place

FAULTS: Final = ("killed", "paused", "wiped", "rolled back")
_PAUSED: Final = 4.0  # seconds: longer than the relay waits for an answer, and a projection for a sign of life


async def test_the_stream_is_a_copy_of_the_log_whatever_happens_to_nats(
    tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """Events are recorded all the while; commands are answered again as soon as NATS is there."""
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance) as load:
            for fault in one_of_each(FAULTS, chance, faults):
                await load.goes_on()
                await _make(fault, stand, load, chance)
                await load.goes_on()
        await stand.is_well(*USUAL)
        found = await check(stand, load.ledger, chance)
        assert min(found) >= faults


async def _make(fault: str, stand: Stand, load: Load, chance: random.Random) -> None:
    nats, older = stand.nats_server, new_place(stand.directory)
    match fault:
        case "killed":
            await nats.kill()
        case "paused":
            nats.pause()
            await asyncio.sleep(chance.uniform(0.5, 1.5) * _PAUSED)
            nats.resume()
            return
        case "wiped":
            await nats.stop()
            nats.wipe()
        case "rolled back":
            await nats.stop()
            nats.copy(older)
            await nats.start()
            await load.goes_on(20)
            await (nats.kill if chance.random() < 0.5 else nats.stop)()
            nats.restore(older)
    await nats.start()
