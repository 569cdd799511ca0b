"""One launched process, without an orchestrator around it."""

from pathlib import Path
from typing import Any

import aiohttp

from fedota.contracts.runtime import CoordinatorSettings, SelectorSettings
from fedota.events.problems import ModelFile, Plan, Strategy
from services.orchestrator.launchers.component import Component, Pace, Program
from tests.integration.orchestrator.run import STAND_IN


def _settings(port: int) -> SelectorSettings:
    return SelectorSettings(problem_id="p", run=1, name="s", coordinator="", token_key="", key="", port=port)


async def test_what_waits_in_vain_is_given_up_and_why_is_told(tmp_path: Path) -> None:
    """Not the first time: what it waits for may be away for a moment. Beside its last words its log is told."""
    told: list[Any] = []
    (tmp_path / "behaviour").write_text("wait")
    pace = Pace(first_delay=0.05, longest_delay=0.1, ready=2.0, grace=3.0, deaths=2)
    program = Program("coordinator", STAND_IN, tmp_path, 1, _settings)
    async with aiohttp.ClientSession() as http:
        component = Component(program, told.append, http, pace)
        await component.keep_alive()
    assert component.failure is not None
    assert component.failure.reason == (
        "coordinator was not ready and said nothing new for 2 seconds (2 times in a row, never ready). "
        "It last said: it waits for what never comes"
    )
    assert component.failure.log.count("made-up words of one that waits") == 2
    assert told == [None], "it was never ready, so nobody hears that it died"


def _of_a_wrong_plan(port: int) -> CoordinatorSettings:
    plan = Plan(rounds=1, goal_count=1, strategy=Strategy(name="telepathy"))
    model = ModelFile(key="k", sha256="0" * 64, size=1)
    common: dict[str, Any] = {"problem_id": "p", "run": 1, "key": "", "port": port}
    return CoordinatorSettings(plan=plan, model=model, nats_url="", nats_credentials="", **common)


async def test_why_one_ended_by_itself_is_told_in_its_own_words(tmp_path: Path) -> None:
    """A setter sees the reason of a failed launch; the log is there for those who need more."""
    pace = Pace(first_delay=0.05, longest_delay=0.1, deaths=2)
    program = Program("coordinator", "fedota.runtime.coordinator", tmp_path, 1, _of_a_wrong_plan)
    async with aiohttp.ClientSession() as http:
        component = Component(program, lambda _: None, http, pace)
        await component.keep_alive()
    assert component.failure is not None
    assert component.failure.reason == (
        "coordinator ended by itself with exit code 1 (2 times in a row, never ready). It last said: The plan's "
        "strategy cannot be used: there is no strategy 'telepathy'; there are: fedavg. Correct the plan."
    )
