"""The clock jumps by an hour, forward and back: order and identity do not depend on it."""

import random
import time
from pathlib import Path
from typing import Final

import msgspec
import pytest

from fedota.contracts import subjects
from fedota.contracts.commands import Command, CreateProblem, Reply, Request
from fedota.events import to_json, uuid7
from tests.contract.ground import Ground
from tests.faults.checker import check
from tests.faults.conftest import one_of_each
from tests.faults.load import ABOUT, Load
from tests.faults.stand import USUAL, Stand
from tests.support.services import new_id

_HOUR: Final = 3600
_JUMPS: Final = (f"+{_HOUR}", f"-{_HOUR}", "+0")
_BACKWARDS: Final = """
select count(*) from (select time < lag(time) over (order by position) as back from fedota.events) t where back
"""
_LIBRARY: Final = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


@pytest.mark.skipif(_LIBRARY is None, reason="libfaketime is not installed (Debian: apt-get install faketime)")
async def test_a_clock_that_jumps_changes_no_order(tmp_path: Path, chance: random.Random, faults: int) -> None:
    """The log's clock is PostgreSQL's: positions, versions and the chain are right, whatever `time` says."""
    clock = tmp_path / "clock"
    _write(clock, "+0")
    env = {
        "LD_PRELOAD": str(_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    async with Stand.up(tmp_path, env=env) as stand:
        async with Load.on(stand, chance) as load:
            for jump in [*one_of_each(_JUMPS, chance, faults), "+0"]:
                _write(clock, jump)
                await load.goes_on()
        await stand.is_well(*USUAL)
        found = await check(stand, load.ledger, chance)
        async with stand.superuser() as connection:
            assert await connection.fetchval(_BACKWARDS) and found.events, "the clock never went back"


@pytest.mark.parametrize(("offset", "is_late"), [(-_HOUR, True), (_HOUR, False)])
async def test_a_command_from_a_clock_that_is_wrong(ground: Ground, offset: int, is_late: bool) -> None:
    """Whose clock is behind is refused before anything is begun; whose clock is ahead is done as long as it takes."""
    begun: list[Command] = []

    async def answer(_: Request, command: Command) -> Reply:
        begun.append(command)
        return Reply(position=1)

    command = CreateProblem(problem_id=new_id(), **ABOUT)
    async with ground.bus("problems") as service, ground.bus("gateway") as gateway:
        await service.answer_commands({CreateProblem: answer})
        request = Request(
            actor="setter",
            key="k",
            correlation=uuid7(),
            deadline=time.time() + offset + 10,
            command=msgspec.Raw(to_json(command)),
        )
        reply = await gateway.client.request(subjects.command("problems", "CreateProblem"), to_json(request), timeout=5)
    assert bool(begun) == (not is_late)
    assert (b"after its deadline and was not begun" in reply.data) == is_late


def _write(clock: Path, offset: str) -> None:
    """Whole or not at all: whoever reads the time meanwhile gets one or the other."""
    draft = clock.with_suffix(".new")
    draft.write_text(offset)
    draft.replace(clock)
