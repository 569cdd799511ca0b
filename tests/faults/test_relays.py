"""Relays: two at once, one of them stopped in the middle of a word, or killed between publishing and hearing of it."""

import asyncio
import random
import signal
from pathlib import Path

from tests.faults.checker import check
from tests.faults.load import Load
from tests.faults.stand import USUAL, Stand


async def test_a_relay_that_was_stopped_comes_back_when_another_has_gone_on(
    tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """What it still had to say fits nowhere any more, and is refused."""
    async with Stand.up(tmp_path) as stand, stand.process("relay", place="relay-2"):
        async with Load.on(stand, chance, pause=0.005) as load:
            for turn in range(2 * faults):
                sleeper = ("relay", "relay-2")[turn % 2]
                assert stand.kill_process(sleeper, signal.SIGSTOP)
                try:
                    before = await stand.last_sequence()
                    await load.goes_on()
                    await stand.passes(before)
                    await asyncio.sleep(chance.uniform(0, 0.3))
                finally:
                    stand.kill_process(sleeper, signal.SIGCONT)
                await asyncio.sleep(chance.uniform(0, 0.3))
        await stand.is_well(*USUAL, "relay-2")
        await check(stand, load.ledger, chance)


async def test_a_relay_is_killed_at_any_moment(tmp_path: Path, chance: random.Random, faults: int) -> None:
    """Also between an event's publication and its confirmation: the stream alone says where it stands."""
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance, pause=0.005) as load:
            for _ in range(2 * faults):
                await stand.passes(await stand.last_sequence())
                await asyncio.sleep(chance.uniform(0, 0.1))
                await stand.comes_back("relay", stand.kill_process("relay"))
        await stand.is_well(*USUAL)
        await check(stand, load.ledger, chance)
